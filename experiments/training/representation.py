"""How a run holds its sparse parameters: dense arrays under masks, or backward sets alone.

The loop, the step and the models are the same for both; what differs is here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import prod
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.errors import UserError
from experiments.task import Task
from experiments.training import optimizers, partition
from experiments.training import state as states
from experiments.training.optimizers import Transform
from experiments.training.state import TrainState
from topkast_jax import always_sparse
from topkast_jax.always_sparse import AlwaysSparse, is_compact
from topkast_jax.always_sparse.products import KERNELS
from topkast_jax.always_sparse.reservoir import host_device
from topkast_jax.patterns import Block
from topkast_jax.trees import flatten_with_names

Tree = Any
Products = Callable[[], AbstractContextManager[None]]
_statistics = jax.jit(tk.statistics.mask_statistics)
_DEVICES = {"tpu": "tpu", "cuda": "gpu"}  # platforms as JAX lowers for them and as devices say it


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

    def mask_statistics(self, state: TrainState) -> dict[str, jax.Array]:
        """`topkast_jax.statistics.mask_statistics`, compiled once."""


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

    def mask_statistics(self, state: TrainState) -> dict[str, jax.Array]:
        """On the devices."""
        return _statistics(state.params, state.opt_state)


class Compact:
    """Always sparse: the devices hold backward sets, the host all else."""

    def __init__(self, config: ConfigDict, task: Task, mesh: Mesh):
        self._task, self._seed, self._mesh = task, config.seed, mesh
        self.sparse: AlwaysSparse
        self.sparse, self.tx = optimizers.make_always_sparse(
            config, states.abstract_params(task), self._place
        )
        _check_backend(config.method.get("backend"), mesh, self.sparse.abstract())
        self._first = self._abstract(0)
        params = self.sparse.masks(self._first.reservoir)[0]
        self._statistics = jax.jit(lambda sets: tk.statistics.mask_statistics(params, sets))

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

    def mask_statistics(self, state: TrainState) -> dict[str, jax.Array]:
        """On the host."""
        with jax.default_device(host_device()):
            return self._statistics(self.masks(state)[1])


def make_form(config: ConfigDict, task: Task, mesh: Mesh) -> Masked | Compact:
    """The form that a validated config asks for."""
    compact = config.method.get("always_sparse", False)
    return Compact(config, task, mesh) if compact else Masked(config, task, mesh)


def _check_backend(backend: str | None, mesh: Mesh, kernels: Tree) -> None:
    """Raises UserError unless a backend takes the mesh's devices and the blocks of the kernels."""
    if backend not in KERNELS:
        return
    found = mesh.devices.flat[0].platform
    own = [name for name, (platform, _) in KERNELS.items() if _DEVICES[platform] == found]
    allowed = " or ".join(map(repr, (None, "xla", *own)))
    if backend not in own:
        raise UserError(
            f"config.method.backend: found {backend!r}; must be {allowed} on devices of {found}"
        )
    for name, block in _product_blocks(kernels).items():
        if reason := KERNELS[backend][1].refuses(block):
            raise UserError(
                f"config.method.backend: found {backend!r}, and {name} refused: {reason}; "
                "must be None or 'xla' with these"
            )


def _product_blocks(kernels: Tree) -> dict[str, tuple[int, int]]:
    """Blocks of the compact matrices, by name: those of a convolution's window go another way."""
    names, leaves, _ = flatten_with_names(kernels, is_leaf=is_compact)
    return {
        name: (leaf.pattern.rows, leaf.pattern.cols)
        for name, leaf in zip(names, leaves, strict=True)
        if is_compact(leaf) and isinstance(leaf.pattern, Block) and prod(leaf.shape[:-2]) == 1
    }


def product_options(config: ConfigDict, mesh: Mesh) -> Products:
    """Makes contexts in which steps are traced: how block products run."""
    backend = config.method.get("backend")
    return lambda: always_sparse.options(backend, mesh=mesh, axes=("data", "fsdp"))


def mask_statistics(form: Form, state: TrainState) -> dict[str, float]:
    """`topkast_jax.statistics.mask_statistics`, where the sets are."""
    return {name: float(value) for name, value in form.mask_statistics(state).items()}


def leaf_counts(form: Form, state: TrainState, dense: bool) -> dict[str, tk.statistics.LeafCounts]:
    """`topkast_jax.statistics.leaf_counts`, where the sets are."""
    params, sets = form.masks(state)
    if state.reservoir == ():
        return tk.statistics.leaf_counts(params, None if dense else sets)
    with jax.default_device(host_device()):
        return tk.statistics.leaf_counts(params, sets)
