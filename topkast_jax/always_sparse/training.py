r"""Training that holds of each sparse leaf its backward set only.

    sparse = AlwaysSparse(top_kast(optax.adam(1e-3), 0.1, 0.2), params)
    params, state, reservoir = sparse.start(params)

A step is the one of the masked path, on the tree of values; `refresh` does, between steps and on
the host, what the masked path does inside them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax.always_sparse import reservoir as hosts
from topkast_jax.always_sparse.compact import CompactKernel, is_compact, unit_shape, values_of
from topkast_jax.always_sparse.moving import Mover, Place
from topkast_jax.always_sparse.reservoir import HostLeaf, Reservoir
from topkast_jax.errors import SparsityError
from topkast_jax.inner_state import map_parameter_shaped
from topkast_jax.patterns import units_in
from topkast_jax.rules import Leaf
from topkast_jax.selection import keep_count
from topkast_jax.sets import CompactState, Sets, SparsifyState, find_compact, find_states
from topkast_jax.sparsify import Plan, SparseTransform
from topkast_jax.trees import flatten_with_names

Tree = Any
T = TypeVar("T")


class AlwaysSparse:
    """The always-sparse form of a sparsity method for one tree of parameters.

    Of each sparse leaf the device holds B and the host the rest: neither parameters nor gradients
    are ever dense there (Jayakumar et al. 2020, abstract).

    Attributes:
      transform: gradient transformation over the tree of values; its `update` takes
        `values_of(gradients)`. With `forward_params` and `optax.apply_updates` it serves as any
        other; its state comes from `start`, since its `init` alone does not know the places.

    One object serves one run at a time. `inner_state` of the method is "reset" whatever it says:
    of an entry that leaves B nothing is left on the device.
    """

    def __init__(
        self,
        tx: SparseTransform,
        params: Tree,
        *,
        delay: int = 0,
        place: Place | None = None,
    ):
        """Looks at the parameters' shapes alone.

        Args:
          tx: what `top_kast`, `static_random` or `sparsify` returns.
          params: dense parameters, or abstract ones.
          delay: a selection of step t is used from step t + delay on, and made while the steps
            between them run.
          place: shape → sharding of what goes to the device; None: JAX's default device.

        Raises:
          SparsityError: not such a transform, a method that needs what is not there, a density or
            delay out of range, or rules that do not fit the parameters.
        """
        if not isinstance(tx, SparseTransform):
            raise SparsityError(
                f"always sparse needs what top_kast(...) or another method returns, found {tx!r}"
            )
        self.plan: Plan = tx.plan
        self.delay, self._place = delay, place
        self._names, arrays, self._treedef = flatten_with_names(params)
        self._dense = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        leaves = self.plan.leaves(params)
        self._leaves = [None if leaf is None else HostLeaf(leaf) for leaf in leaves]
        self._sparse = {leaf.leaf.path: leaf for leaf in self._leaves if leaf}
        _check(self.plan, self._sparse, delay)
        self.transform = optax.GradientTransformationExtraArgs(self._init, self._update)
        self._chooser = ThreadPoolExecutor(1)
        self._ahead: Future[dict[str, Any]] | None = None

    def frozen(self, step: int) -> bool:
        """Whether B has become A after so many finished steps."""
        stop = self.plan.stop_exploring_at
        return stop is not None and step >= int(stop)

    def abstract(self, step: int = 0) -> Tree:
        """Shapes and types of the tree with compact kernels after so many finished steps."""
        return self._treedef.unflatten(
            dense if leaf is None else _abstract_kernel(leaf.leaf, dense.dtype, self.frozen(step))
            for leaf, dense in zip(self._leaves, self._dense, strict=True)
        )

    def abstract_start(
        self, tx: optax.GradientTransformation | None = None, step: int = 0
    ) -> tuple[Tree, Any]:
        """Shapes and types of the values and the optimizer state, as `start` returns them."""
        kernels = self.abstract(step)
        values = values_of(kernels)
        state = jax.eval_shape((self.transform if tx is None else tx).init, values)
        return values, _replace(state, CompactState, lambda c: c._replace(kernels=_places(kernels)))

    def abstract_reservoir(self) -> Reservoir:
        """Empty arrays of the reservoir's shapes; they take no memory before they are written."""
        dense = self._values(self._treedef.unflatten(self._dense))
        theta = {name: np.empty(x.shape, x.dtype) for name, x in dense.items()}
        sets = {name: np.empty(x.shape, np.uint8) for name, x in theta.items()}
        memory = {
            leaf.leaf.path: jax.tree.map(
                lambda x: np.empty(x.shape, x.dtype),
                jax.eval_shape(functools.partial(self._first_memory, leaf.leaf), theta[name]),
            )
            for name, leaf in self._sparse.items()
        }
        chosen = {name: (sets[name], memory[name]) for name in self._sparse} if self.delay else {}
        return Reservoir(theta, sets, memory, chosen)

    def _first_memory(self, leaf: Leaf, theta: Any) -> Any:
        return self.plan.start(leaf, self.plan.keys(leaf, 0), theta)[1]

    def start(
        self, params: Tree, tx: optax.GradientTransformation | None = None
    ) -> tuple[Tree, Any, Reservoir]:
        """The first sets, chosen on the host.

        Args:
          params: dense parameters, best as NumPy arrays or on the host's device.
          tx: what trains, if `transform` is only a part of it (of an `optax.chain`, …).

        Returns:
          The tree of values and the optimizer state, on the device, and the reservoir.

        Raises:
          SparsityError: the method chose sets of another size than the densities say.
        """
        self._ahead = None
        theta = {name: np.array(array) for name, array in self._values(params).items()}
        frozen = self.frozen(0)
        chosen = hosts.in_parallel(
            lambda leaf, theta: hosts.start(self.plan, leaf.leaf, theta, frozen),
            self._sparse, theta,
        )  # fmt: skip
        reservoir = self._reservoir(theta, chosen)
        kernels = self._kernels(params, reservoir)
        values = values_of(kernels)
        state = (self.transform if tx is None else tx).init(values)
        state = _replace(state, CompactState, lambda c: c._replace(kernels=_places(kernels)))
        return values, state, reservoir

    def _reservoir(self, theta: dict[str, np.ndarray], chosen: dict[str, Any]) -> Reservoir:
        sets = {name: flags for name, (flags, _) in chosen.items()}
        memory = {name: memory for name, (_, memory) in chosen.items()}
        return Reservoir(theta, sets, memory, chosen if self.delay else {})

    def _kernels(self, params: Tree, reservoir: Reservoir) -> Tree:
        """The tree with compact kernels, from a reservoir and dense parameters' dense leaves."""

        def kernel(name: str, leaf: HostLeaf | None, array: Any) -> Any:
            if leaf is None:
                return self._put(array)
            made = leaf.kernel(reservoir.theta[name], reservoir.sets[name])
            _check_sizes(leaf.leaf, made.forward, made.backward)
            return jax.tree.map(self._put, made)

        arrays = self._treedef.flatten_up_to(params)
        rows = zip(self._names, self._leaves, arrays, strict=True)
        return self._treedef.unflatten(kernel(*row) for row in rows)

    def _put(self, array: Any) -> jax.Array:
        if self._place is None:
            return jnp.asarray(array)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, self._place(host.shape), host.__getitem__)

    def _init(self, values: Tree) -> CompactState:
        """Places are all 0 here: `start` fills them in."""
        places = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _places(self.abstract(0)))
        return CompactState(jnp.zeros([], jnp.int32), places, self.plan.inner.init(values))

    def _update(
        self, grads: Tree, state: CompactState, params: Tree = None, **extra: Any
    ) -> tuple[Tree, CompactState]:
        if params is None:
            raise SparsityError("update needs the values: transform.update(grads, state, values)")
        columns = (
            self._leaves,
            self._treedef.flatten_up_to(values_of(grads)),
            self._treedef.flatten_up_to(params),
            self._treedef.flatten_up_to(state.kernels),
        )
        shaped = [
            grad if leaf is None else _shape(self.plan, leaf.leaf, grad, values, kernel)
            for leaf, grad, values, kernel in zip(*columns, strict=True)
        ]
        updates, inner_state = self.plan.inner.update(
            self._treedef.unflatten(shaped), state.inner_state, params, **extra
        )
        rounded = [
            update if leaf is None else _rounded(update, state.step)
            for leaf, update in zip(self._leaves, self._treedef.flatten_up_to(updates), strict=True)
        ]
        step = optax.safe_increment(state.step)
        return self._treedef.unflatten(rounded), CompactState(step, state.kernels, inner_state)

    def refresh(
        self, step: int, params: Tree, state: T, reservoir: Reservoir
    ) -> tuple[Tree, T, Reservoir]:
        """What happens between steps; call it after each.

        Args:
          step: finished steps.
          params: the tree of values.
          state: the optimizer state, which holds `transform`'s.
          reservoir: written to.

        Returns:
          The three as they are for the next step; the ones before are gone unless the same.

        Raises:
          SparsityError: a state that `start` did not return, or sets of another size than the
            densities say.
        """
        every, stop = self.plan.refresh_every, self.plan.stop_exploring_at
        if stop is not None and step == int(stop):
            self._write_back(params, reservoir)
            frozen = {
                name: (hosts.freeze(flags), reservoir.memory[name])
                for name, flags in reservoir.sets.items()
            }
            return self._apply(params, state, reservoir, self._reservoir(reservoir.theta, frozen))
        if every is None or self.frozen(step):
            return params, state, reservoir
        if self.delay and step % int(every) == 0:
            self._choose_ahead(step, params, reservoir)
        if step > self.delay and (step - self.delay) % int(every) == 0:
            chosen = self.settled(reservoir).chosen
            self._write_back(params, reservoir)
            chosen = chosen or self._choose(step, reservoir)
            return self._apply(params, state, reservoir, self._reservoir(reservoir.theta, chosen))
        return params, state, reservoir

    def settled(self, reservoir: Reservoir) -> Reservoir:
        """The reservoir with what is being chosen ahead in it, as a checkpoint needs it."""
        if self._ahead is not None:
            reservoir = reservoir._replace(chosen=self._ahead.result())
        return reservoir

    def _choose(self, step: int, reservoir: Reservoir) -> dict[str, Any]:
        return hosts.in_parallel(
            lambda leaf, *of_leaf: hosts.choose(self.plan, leaf.leaf, step, *of_leaf),
            self._sparse, reservoir.theta, reservoir.sets, reservoir.memory,
        )  # fmt: skip

    def _choose_ahead(self, step: int, params: Tree, reservoir: Reservoir) -> None:
        """Chooses in a thread, from a copy of the values that the next steps cannot take away."""
        copies = {name: _whole(jnp.copy(x)) for name, x in self._values(params).items()}

        def choose() -> dict[str, Any]:
            self._scatter(copies, reservoir)
            return self._choose(step, reservoir)

        self._ahead = self._chooser.submit(choose)

    def _values(self, params: Tree) -> dict[str, Any]:
        """What a tree of the parameters' structure holds of the sparse leaves."""
        arrays = zip(self._names, self._treedef.flatten_up_to(params), strict=True)
        return {name: array for name, array in arrays if name in self._sparse}

    def _write_back(self, params: Tree, reservoir: Reservoir) -> None:
        """Makes θ in the reservoir current, once no choice under way reads it."""
        self.settled(reservoir)
        self._scatter({k: _whole(x) for k, x in self._values(params).items()}, reservoir)

    def _scatter(self, values: dict[str, jax.Array], reservoir: Reservoir) -> None:
        def write(leaf: HostLeaf, values: jax.Array, theta: np.ndarray, flags: np.ndarray) -> None:
            leaf.scatter(theta, leaf.index(flags)[0], np.asarray(values))

        hosts.in_parallel(write, self._sparse, values, reservoir.theta, reservoir.sets)

    def _apply(
        self, params: Tree, state: T, old: Reservoir, new: Reservoir
    ) -> tuple[Tree, T, Reservoir]:
        """Brings new sets to the device: only what is new of them is sent."""
        self._ahead = None
        moves = hosts.in_parallel(HostLeaf.move, self._sparse, new.theta, old.sets, new.sets)
        for name, leaf in self._sparse.items():
            _check_sizes(leaf.leaf, moves[name].forward, moves[name].source.shape[-1])
        movers = [
            None if leaf is None else Mover(moves[name], leaf.leaf.stack, self._place)
            for name, leaf in zip(self._names, self._leaves, strict=True)
        ]
        compact = find_compact(state)
        if compact is None:
            raise SparsityError("refresh: this optimizer state is not the one that start returned")
        old_kernels = self._treedef.flatten_up_to(compact.kernels)
        kernels = [
            old if mover is None else mover.places(old)
            for mover, old in zip(movers, old_kernels, strict=True)
        ]
        moved = map_parameter_shaped(
            lambda array, mover: mover.carry(array), state, params,
            self._treedef.unflatten(movers),
            fits=self._holds_units(state, params),
        )  # fmt: skip
        values = [
            array if mover is None else mover.values(array)
            for mover, array in zip(movers, self._treedef.flatten_up_to(params), strict=True)
        ]
        moved = _replace(
            moved, CompactState, lambda c: c._replace(kernels=self._treedef.unflatten(kernels))
        )
        return self._treedef.unflatten(values), moved, new

    def _holds_units(self, state: Any, params: Tree) -> Callable[..., bool]:
        """`fits` of `map_parameter_shaped`: whether an array has a part for each unit.

        One of the values' shape has. What the inner optimizer keeps in another shape (factored
        moments) has if units come first and it would be smaller with one unit fewer.
        """
        fewer = [
            x if leaf is None else _without_one_unit(x, len(leaf.leaf.stack))
            for x, leaf in zip(self._treedef.flatten_up_to(params), self._leaves, strict=True)
        ]
        inner = jax.eval_shape(self.plan.inner.init, self._treedef.unflatten(fewer))
        smaller = _replace(state, CompactState, lambda c: c._replace(inner_state=inner))
        shapes = {path: jnp.shape(x) for path, x in jax.tree.leaves_with_path(smaller)}

        def fits(path: Any, shape: tuple[int, ...], of_values: tuple[int, ...], m: Mover) -> bool:
            axes = m.source.ndim
            varies = shapes.get(path) != shape
            return shape == of_values or (varies and shape[:axes] == of_values[:axes])

        return fits

    def masks(self, reservoir: Reservoir) -> tuple[Tree, SparsifyState]:
        """Abstract dense parameters and the sets, on the host.

        They serve wherever parameters and a masked run's state do, to look at sets:
        ``keep_masks(*sparse.masks(reservoir))``, `topkast_jax.statistics`.
        """
        sets = [reservoir.sets.get(name, optax.MaskedNode()) for name in self._names]
        state = SparsifyState(np.int32(0), self._treedef.unflatten(sets), {}, ())  # type: ignore[arg-type]
        return self._treedef.unflatten(self._dense), state

    def to_masked(self, params: Tree, state: T, reservoir: Reservoir) -> tuple[Tree, T]:
        """Dense parameters, and the optimizer state as the masked path would hold it.

        Moments are zero outside B, as with `inner_state="reset"` there.

        Args:
          params: the tree of values.
          state: the optimizer state, which holds `transform`'s.
          reservoir: its θ is made current.

        Returns:
          Both as NumPy arrays. θ and the sets are the reservoir's own: copy what is to outlive the
          next refresh.
        """
        self._write_back(params, reservoir)
        theta = self._treedef.unflatten(
            reservoir.theta[name] if leaf else np.asarray(_whole(array))
            for name, leaf, array in zip(
                self._names, self._leaves, self._treedef.flatten_up_to(params), strict=True
            )
        )

        def spread(array: jax.Array, leaf: HostLeaf) -> np.ndarray:
            dense = np.zeros((*leaf.leaf.stack, *leaf.leaf.shape), array.dtype)
            flags = reservoir.sets[leaf.leaf.path]
            leaf.scatter(dense, leaf.index(flags)[0], np.asarray(_whole(array)))
            return dense

        leaves = self._treedef.unflatten(self._leaves)
        spread_state = map_parameter_shaped(spread, state, params, leaves)
        sets = self.masks(reservoir)[1].sets
        return theta, _replace(
            spread_state,
            CompactState,
            lambda c: SparsifyState(c.step, sets, dict(reservoir.memory), c.inner_state),
        )

    def from_masked(self, params: Tree, state: T) -> tuple[Tree, T, Reservoir]:
        """The inverse of `to_masked`: values, optimizer state and reservoir.

        Moments outside B, which the masked path may hold with `inner_state="keep"`, are dropped.

        Raises:
          SparsityError: `state` holds no masks, or sets of another size than the densities say.
        """
        self._ahead = None
        (masked,) = find_states(state)
        names, flags, _ = flatten_with_names(masked.sets)
        chosen = {
            name: (np.asarray(f), jax.device_get(masked.memory[name]))
            for name, f in zip(names, flags, strict=True)
        }
        theta = {name: np.array(array) for name, array in self._values(params).items()}
        reservoir = self._reservoir(theta, chosen)
        kernels = self._kernels(params, reservoir)

        def gather(array: jax.Array, leaf: HostLeaf) -> jax.Array:
            index, _ = leaf.index(reservoir.sets[leaf.leaf.path])
            found = leaf.gather(np.asarray(array), index)
            return self._put(found.reshape(*leaf.leaf.stack, *found.shape[1:]))

        leaves = self._treedef.unflatten(self._leaves)
        state = map_parameter_shaped(gather, state, params, leaves)
        state = _replace(
            state, SparsifyState, lambda m: CompactState(m.step, _places(kernels), m.inner_state)
        )
        return values_of(kernels), state, reservoir


def _places(params: Tree) -> Tree:
    """The compact kernels without their values."""
    return jax.tree.map(
        lambda p: p.with_values(None) if is_compact(p) else optax.MaskedNode(),
        params,
        is_leaf=is_compact,
    )


def _check(plan: Plan, leaves: dict[str, HostLeaf], delay: int) -> None:
    if plan.method.needs_gradient:
        raise SparsityError(
            f"{type(plan.method).__name__} chooses by the dense gradient, which always sparse "
            "never makes: use it on dense arrays"
        )
    for name, value in (
        ("forward_density", plan.forward_density), ("backward_density", plan.backward_density),
        ("refresh_every", plan.refresh_every), ("stop_exploring_at", plan.stop_exploring_at),
    ):  # fmt: skip
        if isinstance(value, jax.core.Tracer):
            raise SparsityError(f"{name} is traced: always sparse needs a plain number")
    if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
        raise SparsityError(f"delay={delay!r}: must be an integer of at least 0")
    if delay and plan.refresh_every is None:
        raise SparsityError(f"delay={delay}: must be 0 where sets never change")
    if delay and plan.refresh_every is not None and delay >= int(plan.refresh_every):
        raise SparsityError(
            f"delay={delay}: must be below refresh_every={plan.refresh_every}, so that one choice "
            "is in use before the next begins"
        )
    for leaf in leaves.values():
        hosts.check(leaf.leaf)
    hosts.host_device()


def _counts(leaf: Leaf, frozen: bool) -> tuple[int, int]:
    """Units in A and in B."""
    units = units_in(leaf.pattern, leaf.shape)
    forward = keep_count(units, float(leaf.forward_density))
    return forward, forward if frozen else keep_count(units, float(leaf.backward_density))


def _check_sizes(leaf: Leaf, forward: int, backward: int) -> None:
    expected = {_counts(leaf, frozen) for frozen in (False, True)}
    if (forward, backward) not in expected:
        raise SparsityError(
            f"{leaf.path}: always sparse needs sets of fixed size; densities ask for "
            f"{sorted(expected)} units in A and B, the method chose {(forward, backward)}"
        )


def _abstract_kernel(leaf: Leaf, dtype: Any, frozen: bool) -> CompactKernel:
    forward, backward = _counts(leaf, frozen)
    values = jax.ShapeDtypeStruct((*leaf.stack, backward, *unit_shape(leaf.pattern)), dtype)  # type: ignore[arg-type]
    index = jax.ShapeDtypeStruct((*leaf.stack, backward), jnp.int32)
    return CompactKernel(values, index, leaf.shape, leaf.pattern, forward)  # type: ignore[arg-type]


def _shape(
    plan: Plan, leaf: Leaf, grad: jax.Array, values: jax.Array, kernel: CompactKernel
) -> jax.Array:
    in_a = jnp.arange(kernel.backward) < kernel.forward
    in_a = in_a.reshape(-1, *(1,) * len(unit_shape(kernel.pattern)))
    sets = Sets(jnp.broadcast_to(in_a, values.shape), jnp.ones(values.shape, bool))
    return plan.shape_gradient(leaf, grad, values, sets)


def _rounded(update: jax.Array, step: jax.Array) -> jax.Array:
    """The same bits, in a way that no compiler sees through.

    It keeps one from making one instruction of the optimizer's last product and the sum in
    `apply_updates`, which would round once where the masked path rounds twice.
    """
    integer = jnp.dtype(f"i{update.dtype.itemsize}")
    nothing = (step >> 31).astype(integer)  # steps are not negative
    bits = jax.lax.bitcast_convert_type(update, integer)
    return jax.lax.bitcast_convert_type(bits ^ nothing, update.dtype)


def _without_one_unit(values: jax.Array, stack: int) -> jax.ShapeDtypeStruct:
    *layers, units = values.shape[: stack + 1]
    return jax.ShapeDtypeStruct((*layers, units - 1, *values.shape[stack + 1 :]), values.dtype)


def _whole(array: Any) -> Any:
    """The same array where this process can read all of it; a collective if others hold a part."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return array
    mesh = array.sharding.mesh  # type: ignore[attr-defined]
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=everywhere)(array).addressable_data(0)


def _replace(state: T, kind: type, function: Callable[[Any], Any]) -> T:
    """The optimizer state with each node of a kind replaced."""
    is_node = lambda node: isinstance(node, kind)  # noqa: E731
    return jax.tree.map(lambda n: function(n) if is_node(n) else n, state, is_leaf=is_node)
