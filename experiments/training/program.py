"""Everything that a run compiles, built from its config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.task import Task, make_task
from experiments.training import optimizers, partition
from experiments.training import state as states
from experiments.training.metric_sums import LOSS
from experiments.training.representation import Representation, make_representation
from experiments.training.state import TrainState
from topkast_jax.always_sparse import values_of

Tree = Any


@dataclasses.dataclass(frozen=True)
class Program:
    """The parts that the loop puts together; every function is compiled.

    Attributes:
        config: the validated config.
        task: the model, its data and its loss.
        mesh: the devices.
        representation: how the parameters are held.
        step: (state, batch) → (state, sums); the old state is donated.
        view: (params, opt_state) → the forward view, on which the network runs. Call it once for
            each evaluation pass.
        eval_state: (model state, split) → the state with which evaluation starts.
        eval_step: (forward view, eval state, batch) → (eval state, sums).
        put: brings this host's part of a batch to the devices.
        finite: whether all parameters are finite.
        learning_rate: the learning rate of the step after that many finished steps.
    """

    config: ConfigDict
    task: Task
    mesh: Mesh
    representation: Representation
    step: Step
    view: Callable[[Tree, Tree], Tree]
    eval_state: Callable[[Tree, str], Tree]
    eval_step: Callable[[Tree, Tree, Any], tuple[Tree, Any]]
    put: Callable[[Any], Any]
    finite: Callable[[Tree], jax.Array]
    learning_rate: Callable[[int], float]


def build(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Program:
    """Makes the program of a run; nothing is computed on the devices.

    Args:
        config: a validated config.
        devices: the devices to run on; all devices if None.
    """
    mesh = partition.check_devices(config, devices)
    task = make_task(config)
    held = make_representation(config, task, mesh)
    schedule = optimizers.make_schedule(config)
    everywhere = partition.replicated(mesh)
    carried = _eval_shardings(task, held.abstract().model_state, mesh)

    def eval_step(view: Tree, eval_state: Tree, batch: Any) -> tuple[Tree, Any]:
        with held.products():
            return task.eval_step(view, eval_state, batch)

    return Program(
        config=config,
        task=task,
        mesh=mesh,
        representation=held,
        step=Step(task, held, config.seed, everywhere),
        view=jax.jit(held.forward_view),
        eval_state=jax.jit(task.eval_state, static_argnums=1, out_shardings=carried),
        eval_step=jax.jit(eval_step, out_shardings=(carried, everywhere)),
        put=lambda batch: partition.put_batch(batch, mesh),
        finite=jax.jit(_all_finite),
        learning_rate=lambda done: float(schedule(done)),
    )


def _eval_shardings(task: Task, model_state: Any, mesh: Mesh) -> Any:
    """The shardings of what evaluation carries, so that every batch uses the same program."""
    shapes = jax.eval_shape(lambda state: task.eval_state(state, task.eval_split), model_state)
    return partition.from_specs(task.model_state_specs(shapes), mesh)


class Step:
    """The compiled training step: one program for each set of shapes that a run comes to.

    Shapes change once, when an always-sparse run stops exploring and B becomes A.
    """

    def __init__(self, task: Task, held: Representation, seed: int, everywhere: Any):
        self._task, self._held, self._seed = task, held, seed
        self._everywhere = everywhere
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """Does one step; the old state is donated."""
        new, sums = self._jitted(state)(state._replace(reservoir=()), batch)
        return new._replace(reservoir=state.reservoir), sums

    def gradients(self, state: TrainState, batch: Any, step: int) -> Any:
        """What `Representation.between_steps` needs of the gradients of the next step."""
        return self._held.gradients(state, step, self._loss, state.model_state, batch, state.step)

    def lower(self, state: TrainState, batch: Any) -> jax.stages.Lowered:
        """The step for an abstract state and batch."""
        lowered: jax.stages.Lowered = self._jitted(state).lower(state._replace(reservoir=()), batch)
        return lowered

    def _jitted(self, state: TrainState) -> Any:
        leaves, structure = jax.tree.flatten(state.params)
        key = (structure, *(leaf.shape for leaf in leaves))
        if key not in self._compiled:
            shardings = states.shardings_of(state._replace(reservoir=()))
            self._compiled[key] = jax.jit(
                self._step, donate_argnums=0, out_shardings=(shardings, self._everywhere)
            )
        return self._compiled[key]

    def _step(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        # The view and the update are in one program: what they share is computed once.
        alpha = self._held.forward_view(state.params, state.opt_state)
        # The indices of compact kernels are integers; their gradients are empty and are dropped.
        gradient = jax.value_and_grad(self._loss, has_aux=True, allow_int=True)
        with self._held.products():
            (loss, (model_state, sums)), grads = gradient(
                alpha, state.model_state, batch, state.step
            )
        updates, opt_state = self._held.tx.update(values_of(grads), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, model_state), {**sums, LOSS: loss}

    def _loss(self, alpha: Tree, model_state: Tree, batch: Any, step: jax.Array) -> Any:
        rng = jax.random.fold_in(jax.random.key(self._seed), step)
        return self._task.loss(alpha, model_state, batch, rng)


def _all_finite(params: Tree) -> jax.Array:
    leaves = jax.tree.leaves(params)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
