"""How a run holds its sparse parameters: dense arrays under masks, or backward sets alone.

The loop, the step and the models are the same for both; what differs is here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments import optimizers, partition
from experiments import state as states
from experiments.optimizers import Transform
from experiments.state import TrainState
from experiments.task import Task
from topkast_jax import always_sparse
from topkast_jax.always_sparse import AlwaysSparse
from topkast_jax.always_sparse.reservoir import host_device

Tree = Any
Products = Callable[[], AbstractContextManager[None]]


class Form(Protocol):
    """What the loop needs to know of it.

    Attributes:
        tx: the optimizer, over what the devices hold.
    """

    tx: Transform

    def abstract(self, step: int = 0) -> TrainState:
        """Shapes, types and shardings of the state after so many finished steps."""

    def init(self) -> TrainState:
        """The first state."""

    def between_steps(self, state: TrainState, step: int) -> TrainState:
        """What happens outside the compiled step, after `step` finished ones."""

    def settled(self, state: TrainState) -> TrainState:
        """The state with all that is under way in it, to be saved."""

    def masks(self, state: TrainState) -> tuple[Tree, Tree]:
        """Dense parameters (perhaps abstract) and the sets over them, for statistics."""


class Masked:
    """Dense arrays; the sets, if any, are masks inside the optimizer's state."""

    def __init__(self, config: ConfigDict, task: Task, mesh: Mesh):
        self._task, self._seed = task, config.seed
        self.tx = optimizers.make_optimizer(config, states.abstract_params(task))
        self._abstract = states.abstract_state(task, self.tx, config.seed, mesh)

    def abstract(self, step: int = 0) -> TrainState:
        """The same after any step."""
        del step
        return self._abstract

    def init(self) -> TrainState:
        """Made straight into its shards."""
        return states.init_state(self._task, self.tx, self._seed, self._abstract)

    def between_steps(self, state: TrainState, step: int) -> TrainState:
        """Nothing: the sets change inside the step."""
        del step
        return state

    def settled(self, state: TrainState) -> TrainState:
        """Nothing is ever under way."""
        return state

    def masks(self, state: TrainState) -> tuple[Tree, Tree]:
        """The state's own."""
        return state.params, state.opt_state


class Compact:
    """Always sparse: the devices hold backward sets, the host all else."""

    def __init__(self, config: ConfigDict, task: Task, mesh: Mesh):
        self._task, self._seed, self._mesh = task, config.seed, mesh
        self.sparse: AlwaysSparse
        self.sparse, self.tx = optimizers.make_always_sparse(
            config, states.abstract_params(task), self._place
        )
        self._first = self._abstract(0)

    def _place(self, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(self._mesh, partition.spec(shape, self._mesh))

    def abstract(self, step: int = 0) -> TrainState:
        """Of one of two: while it explores, and after."""
        same = self.sparse.frozen(step) == self.sparse.frozen(0)
        return self._first if same else self._abstract(step)

    def _abstract(self, step: int) -> TrainState:
        _, model_state = jax.eval_shape(lambda: states.init_model(self._task, self._seed))
        values, opt_state = self.sparse.abstract_start(self.tx, step)
        step_shape: Any = jax.ShapeDtypeStruct((), np.int32)
        shapes = TrainState(step_shape, values, opt_state, model_state)
        reservoir = self.sparse.abstract_reservoir()
        return states.on_mesh(shapes, self._task, self._mesh)._replace(reservoir=reservoir)

    def init(self) -> TrainState:
        """Dense parameters are made on the host and never leave it."""
        places = states.shardings_of(self.abstract(0)._replace(reservoir=()))
        with jax.default_device(host_device()):
            params, model_state = jax.device_get(
                jax.jit(lambda: states.init_model(self._task, self._seed))()
            )
        tx = optax.GradientTransformation(
            jax.jit(self.tx.init, out_shardings=places.opt_state), self.tx.update
        )
        values, opt_state, reservoir = self.sparse.start(params, tx)
        step, model_state = jax.device_put(
            (np.int32(0), model_state), (places.step, places.model_state)
        )
        return TrainState(step, values, opt_state, model_state, reservoir)

    def between_steps(self, state: TrainState, step: int) -> TrainState:
        """The refresh."""
        params, opt_state, reservoir = self.sparse.refresh(
            step, state.params, state.opt_state, state.reservoir
        )
        return state._replace(params=params, opt_state=opt_state, reservoir=reservoir)

    def settled(self, state: TrainState) -> TrainState:
        """With the choice that a thread is making."""
        return state._replace(reservoir=self.sparse.settled(state.reservoir))

    def masks(self, state: TrainState) -> tuple[Tree, Tree]:
        """The reservoir's."""
        return self.sparse.masks(state.reservoir)


def make_form(config: ConfigDict, task: Task, mesh: Mesh) -> Masked | Compact:
    """The form that a validated config asks for."""
    compact = config.method.get("always_sparse", False)
    return Compact(config, task, mesh) if compact else Masked(config, task, mesh)


def product_options(config: ConfigDict, mesh: Mesh) -> Products:
    """Makes contexts in which steps are traced: how block products run."""
    backend = config.method.get("backend")
    return lambda: always_sparse.options(backend, mesh=mesh, axes=("data", "fsdp"))


def mask_statistics(form: Form, state: TrainState) -> dict[str, float]:
    """`topkast_jax.statistics.mask_statistics`, where the sets are."""
    params, sets = form.masks(state)
    if state.reservoir == ():
        found = _statistics(params, sets)
    else:
        with jax.default_device(host_device()):
            found = jax.jit(lambda s: tk.statistics.mask_statistics(params, s))(sets)
    return {name: float(value) for name, value in found.items()}


def leaf_counts(form: Form, state: TrainState, dense: bool) -> dict[str, tk.statistics.LeafCounts]:
    """`topkast_jax.statistics.leaf_counts`, where the sets are."""
    params, sets = form.masks(state)
    if state.reservoir == ():
        return tk.statistics.leaf_counts(params, None if dense else sets)
    with jax.default_device(host_device()):
        return tk.statistics.leaf_counts(params, sets)


_statistics = jax.jit(tk.statistics.mask_statistics)
