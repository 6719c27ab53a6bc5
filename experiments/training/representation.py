"""How a run holds its parameters: dense, dense under masks, or always sparse.

The loop, the training step and the models are the same for all three. Everything in which they
differ is a method of the classes here.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.errors import UserError
from experiments.task import Task
from experiments.training import methods, optimizers, partition
from experiments.training import state as states
from experiments.training.optimizers import Transform
from experiments.training.state import TrainState
from topkast_jax import always_sparse
from topkast_jax.always_sparse import AlwaysSparse, is_compact
from topkast_jax.always_sparse.host import host_device
from topkast_jax.always_sparse.products import INTERPRETED, KERNELS
from topkast_jax.sets import presents
from topkast_jax.trees import flatten_with_names

Tree = Any
LeafCounts = tk.statistics.LeafCounts
Counting = Callable[[], dict[str, LeafCounts]]
_statistics = jax.jit(tk.statistics.mask_statistics)
_flags = jax.jit(lambda params, state: presents(params, state).flags)
# JAX names the platforms for lowering differently.
_DEVICES = {"tpu": "tpu", "cuda": "gpu", "cpu": "cpu"}


class Representation(abc.ABC):
    """How a run holds its parameters; the defaults are those of a run without sets.

    Attributes:
        tx: the optimizer, over the arrays that the devices hold.
    """

    tx: Transform

    def __init__(self, config: ConfigDict, task: Task, mesh: Mesh):
        self._task, self._seed, self._mesh = task, config.seed, mesh
        self._make_optimizer(config, states.abstract_params(task))
        self._first = self._abstract()

    @abc.abstractmethod
    def _make_optimizer(self, config: ConfigDict, params: Tree) -> None: ...

    def _abstract(self, step: int = 0) -> TrainState:
        del step
        return states.abstract_state(self._task, self.tx, self._seed, self._mesh)

    def forward_view(self, params: Tree, opt_state: Tree) -> Tree:
        """The parameters that the network runs on; can be traced."""
        del opt_state
        return params

    def products(self) -> AbstractContextManager[None]:
        """The context in which a step is traced: the mesh, and how block products are computed."""
        return jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh)

    def abstract(self, step: int = 0) -> TrainState:
        """The shapes, types and shardings of the state after that many finished steps."""
        del step
        return self._first

    def init(self) -> TrainState:
        """The state before the first step, initialised directly into its shards."""
        return states.init_state(self._task, self.tx, self._seed, self._first)

    def gradients(
        self, state: TrainState, step: int, loss: Callable[..., Any], *args: Any
    ) -> dict[str, np.ndarray] | None:
        """What `between_steps` needs of the gradients of a step that is about to be made.

        Args:
            state: the state before the step.
            step: the number of the step; the first is 1.
            loss: a function of the forward view and `args`, which returns the loss and more.
            *args: what the step computes its loss from.
        """
        del state, step, loss, args
        return None

    def between_steps(
        self, state: TrainState, step: int, gradients: dict[str, np.ndarray] | None = None
    ) -> TrainState:
        """Does what happens outside the compiled step, after `step` finished steps."""
        del step, gradients
        return state

    def settled(self, state: TrainState) -> TrainState:
        """The state, including results of work that still runs in the background, to be saved."""
        return state

    def mask_statistics(self, state: TrainState) -> dict[str, float]:
        """`topkast_jax.statistics.mask_statistics`; empty without sets."""
        del state
        return {}

    def flags(self, state: TrainState) -> dict[str, np.ndarray]:
        """The flags (`topkast_jax.flags`) of each sparse leaf on every host; empty without sets."""
        del state
        return {}

    def leaf_counts(self, state: TrainState) -> dict[str, LeafCounts]:
        """`topkast_jax.statistics.leaf_counts`: the entries of each leaf and of its sets."""
        return tk.statistics.leaf_counts(state.params)

    def new_counts(self, state: TrainState, step: int) -> tuple[int, Counting] | None:
        """The counts of sets that changed, and the first step that uses them.

        Call it after each step. A change is reported once, at the latest after its first step. The
        counts are a function, so that only who calls it waits for the devices.
        """
        del state, step
        return None

    def needs_dense_gradient(self, step: int) -> bool:
        """Whether the method needs the gradient of whole leaves in a step; the first is 1."""
        del step
        return False

    def chooses(self, step: int) -> bool:
        """Whether the time of a step includes a choice of sets; the first step is 1."""
        del step
        return False

    def to_masked(self, state: TrainState) -> TrainState:
        """The same state with dense parameters and masks."""
        return state

    def from_masked(self, state: TrainState) -> TrainState:
        """The inverse of `to_masked`."""
        return state

    def export(self, state: TrainState, form: str) -> tuple[str, Tree]:
        """The forward view as host arrays, and the form in which it is.

        Args:
            state: the state to export.
            form: the form of sparse leaves, one of `topkast_jax.always_sparse.FORMS`. Without
                sparse leaves the form is always "dense".
        """
        del form
        return "dense", jax.tree.map(np.asarray, state.params)


class Dense(Representation):
    """Dense parameters and no sets."""

    def _make_optimizer(self, config: ConfigDict, params: Tree) -> None:
        self.tx = optimizers.make_dense(config, params)


class Masked(Representation):
    """Dense parameters, with the sets as masks inside the optimizer's state."""

    def _make_optimizer(self, config: ConfigDict, params: Tree) -> None:
        self._method, self.tx = optimizers.make_masked(config, params)
        self._scales = config.method.scale_to_fan_in

    def init(self) -> TrainState:
        """With `method.scale_to_fan_in`, kept entries are those of a sparse layer."""
        state = super().init()
        if not self._scales:
            return state
        scale = jax.jit(
            lambda params, opt_state: tk.scale_to_fan_in(params, opt_state, self._method),
            out_shardings=states.shardings_of(self._first).params,
        )
        return state._replace(params=scale(state.params, state.opt_state))

    def forward_view(self, params: Tree, opt_state: Tree) -> Tree:
        """The parameters on the forward set, and zero elsewhere."""
        return tk.forward_params(params, opt_state)

    def mask_statistics(self, state: TrainState) -> dict[str, float]:
        """Computed on the devices."""
        return jax.tree.map(float, _statistics(state.params, state.opt_state))

    def flags(self, state: TrainState) -> dict[str, np.ndarray]:
        """Gathered from the devices, one leaf at a time."""
        found = _flags(state.params, state.opt_state)
        return {
            name: multihost_utils.process_allgather(leaf, tiled=True)
            for name, leaf in found.items()
        }

    def leaf_counts(self, state: TrainState) -> dict[str, LeafCounts]:
        """Counted on the devices."""
        return tk.statistics.leaf_counts(state.params, state.opt_state)

    def new_counts(self, state: TrainState, step: int) -> tuple[int, Counting] | None:
        """Counted after the first step of new sets, since to choose them again takes time.

        The step at which exploring stops leaves only A of its sets: those are counted before it.
        """
        plan, params, opt_state = self._method.plan, state.params, state.opt_state
        is_last = lambda step: plan.stop_exploring_at == step  # noqa: E731
        if plan.counts_change_after(step) and is_last(step + 1):
            return step + 1, tk.statistics.start_leaf_counts(params, opt_state)
        if step > 1 and plan.counts_change_after(step - 1) and not is_last(step):
            used = tk.statistics.start_leaf_counts(params, opt_state, of_last_step=True)
            return step, used
        return None

    def needs_dense_gradient(self, step: int) -> bool:
        """As the method says."""
        return self._method.plan.needs_dense_gradient(step)

    def chooses(self, step: int) -> bool:
        """A choice that is due after a step is made in the next one."""
        return step > 1 and self._method.plan.chooses_after(step - 1)

    def export(self, state: TrainState, form: str) -> tuple[str, Tree]:
        """Blocks and stacked layers are kept where the run could be always sparse.

        Masks say nothing about either. A method, a density or an optimizer that cannot be always
        sparse is exported as single entries.
        """
        params, opt_state = state.params, state.opt_state
        with contextlib.suppress(tk.SparsityError):
            sparse = AlwaysSparse(self._method, params)
            params, opt_state, _ = sparse.from_masked(params, opt_state)
        return form, always_sparse.export(params, opt_state, form)  # type: ignore[arg-type]


class Compact(Representation):
    """Always sparse: the devices hold the backward sets, and the host holds all else."""

    def _make_optimizer(self, config: ConfigDict, params: Tree) -> None:
        self.sparse, self.tx = optimizers.make_compact(config, params, self._sharding)
        self._scales = config.method.scale_to_fan_in
        self._backend = config.method.get("backend")
        _check_backend(self._backend, self._mesh, self.sparse.abstract())
        dense = self.sparse.masks(self.sparse.abstract_reservoir())[0]
        self._statistics = jax.jit(lambda sets: tk.statistics.mask_statistics(dense, sets))

    def _sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(self._mesh, partition.spec(shape, self._mesh))

    def forward_view(self, params: Tree, opt_state: Tree) -> Tree:
        """A compact kernel in place of each sparse leaf."""
        return tk.forward_params(params, opt_state)

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """The mesh, and the backend of the config on the axes over which batches are split."""
        axes = ("data", "fsdp")
        with super().products(), always_sparse.options(self._backend, mesh=self._mesh, axes=axes):
            yield

    def abstract(self, step: int = 0) -> TrainState:
        """Shapes change once, when the run stops exploring."""
        same = self.sparse.frozen(step) == self.sparse.frozen(0)
        return self._first if same else self._abstract(step)

    def _abstract(self, step: int = 0) -> TrainState:
        _, model_state = jax.eval_shape(lambda: states.init_model(self._task, self._seed))
        values, opt_state = self.sparse.abstract_start(self.tx, step)
        step_shape: Any = jax.ShapeDtypeStruct((), np.int32)
        shapes = TrainState(step_shape, values, opt_state, model_state)
        reservoir = self.sparse.abstract_reservoir()
        return states.on_mesh(shapes, self._task, self._mesh)._replace(reservoir=reservoir)

    def init(self) -> TrainState:
        """Dense parameters are initialised on the host and never leave it."""
        shardings = states.shardings_of(self.abstract(0)._replace(reservoir=()))
        with jax.default_device(host_device()):
            params, model_state = jax.jit(lambda: states.init_model(self._task, self._seed))()
        tx = optax.GradientTransformation(
            jax.jit(self.tx.init, out_shardings=shardings.opt_state), self.tx.update
        )
        values, opt_state, reservoir = self.sparse.start(params, tx, donate=True)
        step, model_state = jax.device_put(
            (np.int32(0), jax.device_get(model_state)), (shardings.step, shardings.model_state)
        )
        state = TrainState(step, values, opt_state, model_state, reservoir)
        return self._scaled_to_fan_in(state) if self._scales else state

    def _scaled_to_fan_in(self, state: TrainState) -> TrainState:
        masked = self.to_masked(state)
        with jax.default_device(host_device()):
            params = tk.scale_to_fan_in(masked.params, masked.opt_state, self.sparse)
        return self.from_masked(masked._replace(params=jax.device_get(params)))

    def gradients(
        self, state: TrainState, step: int, loss: Callable[..., Any], *args: Any
    ) -> dict[str, np.ndarray] | None:
        """Dense ones, a few leaves at a time, where the method chooses by them."""
        if not self.sparse.needs_gradients(step):
            return None
        with self.products():
            return self.sparse.gradients(loss, state.params, state.opt_state, *args, has_aux=True)

    def needs_dense_gradient(self, step: int) -> bool:
        """As the method says."""
        return self.sparse.needs_gradients(step)

    def chooses(self, step: int) -> bool:
        """The host chooses, or brings sets that it chose ahead, before the next step starts."""
        return self.sparse.changes_after(step)

    def between_steps(
        self, state: TrainState, step: int, gradients: dict[str, np.ndarray] | None = None
    ) -> TrainState:
        """Refreshes the sets when that is due."""
        params, opt_state, reservoir = self.sparse.refresh(
            step, state.params, state.opt_state, state.reservoir, gradients
        )
        return state._replace(params=params, opt_state=opt_state, reservoir=reservoir)

    def settled(self, state: TrainState) -> TrainState:
        """Includes the sets that a background thread is choosing."""
        return state._replace(reservoir=self.sparse.settled(state.reservoir))

    def mask_statistics(self, state: TrainState) -> dict[str, float]:
        """Computed on the host, which holds the sets."""
        with jax.default_device(host_device()):
            return jax.tree.map(float, self._statistics(self.sparse.masks(state.reservoir)[1]))

    def flags(self, state: TrainState) -> dict[str, np.ndarray]:
        """Those of the host."""
        return {name: np.asarray(leaf) for name, leaf in state.reservoir.sets.items()}

    def leaf_counts(self, state: TrainState) -> dict[str, LeafCounts]:
        """Counted on the host."""
        with jax.default_device(host_device()):
            return tk.statistics.leaf_counts(*self.sparse.masks(state.reservoir))

    def new_counts(self, state: TrainState, step: int) -> tuple[int, Counting] | None:
        """Counted when the sets come to the devices, between two steps."""
        if not self.sparse.changes_after(step):
            return None
        counts = self.leaf_counts(state)
        return step + 1, lambda: counts

    def to_masked(self, state: TrainState) -> TrainState:
        """Dense parameters are put together on the host."""
        reservoir = self.sparse.settled(state.reservoir)
        params, opt_state = self.sparse.to_masked(state.params, state.opt_state, reservoir)
        return TrainState(state.step, params, opt_state, state.model_state)

    def from_masked(self, state: TrainState) -> TrainState:
        """Moments outside the backward set are dropped."""
        values, opt_state, reservoir = self.sparse.from_masked(state.params, state.opt_state)
        return TrainState(state.step, values, opt_state, state.model_state, reservoir)

    def export(self, state: TrainState, form: str) -> tuple[str, Tree]:
        """The forward part of each kernel."""
        params, opt_state = state.params, state.opt_state
        return form, always_sparse.export(params, opt_state, form)  # type: ignore[arg-type]


REPRESENTATIONS: dict[str, type[Representation]] = {
    "dense": Dense,
    "masked": Masked,
    "always_sparse": Compact,
}


def make_representation(config: ConfigDict, task: Task, mesh: Mesh) -> Representation:
    """The representation that a validated config asks for."""
    return REPRESENTATIONS[methods.representation(config.method)](config, task, mesh)


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
    for name, unit in _product_units(kernels).items():
        if not unit and backend in INTERPRETED:  # single entries beside blocks: by their tile
            continue
        reason = KERNELS[backend][1].refuses(unit)
        if not unit and mesh.size > 1:
            reason = f"single entries need one device, found a mesh of {mesh.size}"
        if reason:
            raise UserError(
                f"config.method.backend: found {backend!r}, and {name} refused: {reason}; "
                "must be None or 'xla' with these"
            )


def _product_units(kernels: Tree) -> dict[str, tuple[int, ...]]:
    """The units of the compact matrices by name; other convolutions do not use these products."""
    names, leaves, _ = flatten_with_names(kernels, is_leaf=is_compact)
    return {
        name: leaf.pattern.unit_shape
        for name, leaf in zip(names, leaves, strict=True)
        if is_compact(leaf) and prod(leaf.shape[:-2]) == 1
    }
