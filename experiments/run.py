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
from experiments import optimizers, partition
from experiments import state as states
from experiments.state import TrainState
from experiments.task import Task, make_task
from experiments.totals import LOSS

Tree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts that the loop puts together; every function is compiled.

    Attributes:
        config: validated.
        task: the model, its data and its loss.
        mesh: the devices.
        abstract: the state's shapes, types and shardings.
        init: the first state.
        step: (state, batch) → (state, sums); the old state is gone after it.
        between_steps: what happens outside the compiled step.
        view: (params, opt_state) → what the network runs on.
        eval_state: (model state, split) → what evaluation starts from.
        eval_step: (view, eval state, batch) → (eval state, sums).
        put: brings this host's part of a batch to the devices.
        masks: the state's mask statistics; empty for a dense run.
        finite: whether all parameters are finite.
        learning_rate: of the step after so many finished ones.
    """

    config: ConfigDict
    task: Task
    mesh: Mesh
    abstract: TrainState
    init: Callable[[], TrainState]
    step: Callable[[TrainState, Any], tuple[TrainState, Any]]
    between_steps: Callable[[TrainState], TrainState]
    view: optimizers.View
    eval_state: Callable[[Tree, str], Tree]
    eval_step: Callable[[Tree, Tree, Any], tuple[Tree, Any]]
    put: Callable[[Any], Any]
    masks: Callable[[TrainState], dict[str, jax.Array]]
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
    tx = optimizers.make_optimizer(config, states.abstract_params(task))
    view = optimizers.forward_view(config)
    schedule = optimizers.make_schedule(config)
    abstract = states.abstract_state(task, tx, config.seed, mesh)
    places = states.shardings_of(abstract)
    everywhere = partition.replicated(mesh)
    return Run(
        config=config,
        task=task,
        mesh=mesh,
        abstract=abstract,
        init=lambda: states.init_state(task, tx, config.seed, abstract),
        step=jax.jit(
            train_step(task, tx, view, config.seed),
            donate_argnums=0,
            out_shardings=(places, everywhere),
        ),
        between_steps=lambda state: state,
        view=jax.jit(view, out_shardings=places.params),
        eval_state=jax.jit(task.eval_state, static_argnums=1),
        eval_step=jax.jit(task.eval_step, out_shardings=(None, everywhere)),
        put=lambda batch: partition.put_batch(batch, mesh),
        masks=jax.jit(_mask_statistics if config.method.name != "dense" else lambda state: {}),
        finite=jax.jit(_all_finite),
        learning_rate=lambda done: float(schedule(done)),
    )


def train_step(
    task: Task, tx: optimizers.Transform, view: optimizers.View, seed: int
) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
    """The step, to be compiled."""

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        alpha = view(state.params, state.opt_state)
        gradient = jax.value_and_grad(task.loss, has_aux=True)
        (loss, (model_state, sums)), grads = gradient(alpha, state.model_state, batch, rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, model_state), {**sums, LOSS: loss}

    return step


def _mask_statistics(state: TrainState) -> dict[str, jax.Array]:
    return tk.statistics.mask_statistics(state.params, state.opt_state)


def _all_finite(params: Tree) -> jax.Array:
    leaves = jax.tree.leaves(params)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
