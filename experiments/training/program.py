"""Everything a run is made of, built from its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.task import Task, make_task
from experiments.training import optimizers, partition
from experiments.training import state as states
from experiments.training.metric_sums import LOSS
from experiments.training.representation import (
    Form,
    Products,
    leaf_counts,
    make_form,
    mask_statistics,
    product_options,
)
from experiments.training.state import TrainState
from topkast_jax.always_sparse import values_of

Tree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts that the loop puts together; every function is compiled.

    Attributes:
        config: validated.
        task: the model, its data and its loss.
        mesh: the devices.
        form: how the sparse parameters are held.
        abstract: the first state's shapes, types and shardings.
        init: the first state.
        step: (state, batch) → (state, sums); the old state is gone after it.
        view: (params, opt_state) → what the network runs on.
        eval_state: (model state, split) → what evaluation starts from.
        eval_step: (view, eval state, batch) → (eval state, sums).
        put: brings this host's part of a batch to the devices.
        masks: the state's mask statistics; empty for a dense run.
        leaf_counts: entries of each leaf and of its sets.
        finite: whether all parameters are finite.
        learning_rate: of the step after so many finished ones.
    """

    config: ConfigDict
    task: Task
    mesh: Mesh
    form: Form
    abstract: TrainState
    init: Callable[[], TrainState]
    step: Step
    view: optimizers.View
    eval_state: Callable[[Tree, str], Tree]
    eval_step: Callable[[Tree, Tree, Any], tuple[Tree, Any]]
    put: Callable[[Any], Any]
    masks: Callable[[TrainState], dict[str, float]]
    leaf_counts: Callable[[TrainState], dict[str, tk.statistics.LeafCounts]]
    finite: Callable[[Tree], jax.Array]
    learning_rate: Callable[[int], float]


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Run:
    """Makes the parts; nothing is computed on the devices.

    Args:
        config: validated.
        devices: what to run on; all there are if None.
    """
    mesh = partition.make_mesh(config.mesh, devices)
    partition.check_batch_size("config.batch_size", config.batch_size, mesh)
    task = make_task(config)
    form = make_form(config, task, mesh)
    view = optimizers.forward_view(config)
    schedule = optimizers.make_schedule(config)
    abstract = form.abstract()
    dense = config.method.name == "dense"
    everywhere = partition.replicated(mesh)
    products = product_options(config, mesh)
    evaluate = _traced_under(products, task.eval_step)
    carried = _eval_places(task, abstract.model_state, mesh)
    step = Step(train_step(task, form.tx, view, config.seed), products, everywhere)
    return Run(
        config=config,
        task=task,
        mesh=mesh,
        form=form,
        abstract=abstract,
        init=form.init,
        step=step,
        view=jax.jit(view),
        eval_state=jax.jit(task.eval_state, static_argnums=1, out_shardings=carried),
        eval_step=jax.jit(evaluate, out_shardings=(carried, everywhere)),
        put=lambda batch: partition.put_batch(batch, mesh),
        masks=lambda state: {} if dense else mask_statistics(form, state),
        leaf_counts=lambda state: leaf_counts(form, state, dense),
        finite=jax.jit(_all_finite),
        learning_rate=lambda done: float(schedule(done)),
    )


def _eval_places(task: Task, model_state: Any, mesh: Mesh) -> Any:
    """Where what evaluation carries lies, so that each batch meets what it was compiled for."""
    shapes = jax.eval_shape(lambda state: task.eval_state(state, task.eval_split), model_state)
    return partition.from_specs(task.model_state_specs(shapes), mesh)


class Step:
    """The compiled step: one program for each set of shapes that a run comes to.

    Shapes change once, when an always-sparse run stops exploring and B becomes A.
    """

    def __init__(self, step: Callable[..., Any], products: Products, everywhere: Any):
        self._step = _traced_under(products, step)
        self._everywhere = everywhere
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """One step; the old state is gone after it."""
        new, sums = self._jitted(state)(state._replace(reservoir=()), batch)
        return new._replace(reservoir=state.reservoir), sums

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """The step for an abstract state and batch."""
        lowered: jax.stages.Lowered = self._jitted(state).lower(state._replace(reservoir=()), batch)
        return lowered

    def _jitted(self, state: TrainState) -> Any:
        leaves, structure = jax.tree.flatten(state.params)
        key = (structure, *(leaf.shape for leaf in leaves))
        if key not in self._compiled:
            places = states.shardings_of(state._replace(reservoir=()))
            self._compiled[key] = jax.jit(
                self._step, donate_argnums=0, out_shardings=(places, self._everywhere)
            )
        return self._compiled[key]


def _traced_under(products: Products, function: Callable[..., Any]) -> Callable[..., Any]:
    def traced(*args: Any) -> Any:
        with products():
            return function(*args)

    return traced


def train_step(
    task: Task, tx: optimizers.Transform, view: optimizers.View, seed: int
) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """The step, to be compiled."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        alpha = view(state.params, state.opt_state)
        # Compact kernels hold places too, integers: their gradient is nothing and is dropped.
        gradient = jax.value_and_grad(task.loss, has_aux=True, allow_int=True)
        (loss, (model_state, sums)), grads = gradient(alpha, state.model_state, batch, rng)
        updates, opt_state = tx.update(values_of(grads), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, model_state), {**sums, LOSS: loss}

    return step


def _all_finite(params: Tree) -> jax.Array:
    leaves = jax.tree.leaves(params)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
