r"""Training that holds of each sparse leaf its backward set only.

    sparse = AlwaysSparse(top_kast(optax.adam(1e-3), 0.1, 0.2), params)
    params, state, reservoir = sparse.start(params)

A step is the one of the masked path, on the tree of values; `refresh` does, between steps and on
the host, what the masked path does inside them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax.always_sparse import reservoir as hosts
from topkast_jax.always_sparse.checks import (
    check_plan,
    check_sizes,
    leaves_like,
    unit_counts,
    whole_number,
)
from topkast_jax.always_sparse.compact import CompactKernel, is_compact, unit_shape, values_of
from topkast_jax.always_sparse.moving import Mover, Place, first_arrays, unit_axes
from topkast_jax.always_sparse.reservoir import HostLeaf, Reservoir
from topkast_jax.errors import SparsityError
from topkast_jax.inner_state import map_parameter_shaped
from topkast_jax.rules import Leaf
from topkast_jax.sets import CompactState, Sets, SparsifyState, find_compact, find_states
from topkast_jax.sparsify import Plan, SparseTransform
from topkast_jax.trees import flatten, flatten_with_names

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
            delay out of range, rules that do not fit the parameters, or an inner optimizer whose
            state a refresh cannot follow.
        """
        if not isinstance(tx, SparseTransform):
            raise SparsityError(
                "always sparse needs what top_kast(...) or another method returns, found a "
                f"{type(tx).__name__}"
            )
        self.plan: Plan = tx.plan
        self.delay, self._place = whole_number("delay", delay), place
        self._names, arrays, self._treedef = flatten_with_names(params)
        self._dense = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays]
        leaves = self.plan.leaves(params)
        self._leaves = [None if leaf is None else HostLeaf(leaf) for leaf in leaves]
        self._sparse = {leaf.leaf.path: leaf for leaf in self._leaves if leaf}
        check_plan(self.plan, self._sparse, self.delay)
        self._axes = unit_axes(self.plan.inner.init, values_of(self.abstract()), leaves)
        self._firsts = [
            first_arrays(self.plan.inner.init, self._axes, number) for number in range(len(leaves))
        ]
        self.transform = optax.GradientTransformationExtraArgs(self._init, self._update)
        self._is_starting = False
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
        init = functools.partial(jax.eval_shape, (self.transform if tx is None else tx).init)
        return values_of(kernels), self._first_state(init, kernels)

    def _first_state(self, init: Callable[[Tree], Any], kernels: Tree) -> Any:
        self._is_starting = True
        try:
            state = init(values_of(kernels))
        finally:
            self._is_starting = False
        if find_compact(state) is None:
            raise SparsityError("start: AlwaysSparse.transform is no part of the tx it was given")
        return _replace(state, CompactState, lambda c: c._replace(kernels=_places(kernels)))

    def abstract_reservoir(self) -> Reservoir:
        """Empty arrays of the reservoir's shapes; they take no memory before they are written."""
        rows = zip(self._names, self._dense, strict=True)
        theta = {k: np.empty(x.shape, x.dtype) for k, x in rows if k in self._sparse}
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
          params: dense parameters, best as NumPy arrays or on the host's device; copied.
          tx: what trains, if `transform` is only a part of it (of an `optax.chain`, …).

        Returns:
          The tree of values and the optimizer state, on the device, and the reservoir.

        Raises:
          SparsityError: other parameters than those of `__init__`, a `tx` without `transform` in
            it, or sets of another size than the densities say.
        """
        self._ahead = None
        theta = self._theta("start", params)
        frozen = self.frozen(0)
        chosen = hosts.in_parallel(
            lambda leaf, theta: hosts.start(self.plan, leaf.leaf, theta, frozen),
            self._sparse, theta,
        )  # fmt: skip
        reservoir = self._reservoir(theta, chosen)
        kernels = self._kernels(params, reservoir)
        state = self._first_state((self.transform if tx is None else tx).init, kernels)
        return values_of(kernels), state, reservoir

    def _theta(self, what: str, params: Tree) -> dict[str, np.ndarray]:
        """A copy of the sparse leaves of dense parameters, in the host's memory."""
        leaves = leaves_like(what, params, self._treedef, self._names, self._dense)
        rows = zip(self._names, leaves, self._dense, strict=True)
        return {k: np.array(x, s.dtype, order="C") for k, x, s in rows if k in self._sparse}

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
            check_sizes(leaf.leaf, made.forward, made.backward)
            return jax.tree.map(self._put, made)

        arrays = self._treedef.flatten_up_to(params)
        rows = zip(self._names, self._leaves, arrays, strict=True)
        return self._treedef.unflatten(kernel(*row) for row in rows)

    def _put(self, array: Any) -> jax.Array:
        host = np.array(array)
        if self._place is None:
            return jnp.asarray(host)
        return jax.make_array_from_callback(host.shape, self._place(host.shape), host.__getitem__)

    def _init(self, values: Tree) -> CompactState:
        """Places are all 0 here: `start` fills them in."""
        if not self._is_starting:
            raise SparsityError(
                "transform.init does not know where the units sit: take the state that "
                "AlwaysSparse.start returns, or abstract_start for its shapes"
            )
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
            grad if leaf is None else _shaped(self.plan, leaf.leaf, grad, values, kernel)
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
        step = whole_number("step", step)
        every, stop = self.plan.refresh_every, self.plan.stop_exploring_at
        if stop is not None and step == int(stop):
            reservoir = self._current("refresh", params, state, reservoir)
            frozen = {
                name: (hosts.freeze(flags), reservoir.memory[name])
                for name, flags in reservoir.sets.items()
            }
            return self._apply(params, state, reservoir, self._reservoir(reservoir.theta, frozen))
        if every is None or self.frozen(step):
            return params, state, reservoir
        if self.delay and step % int(every) == 0:
            reservoir = self._choose_ahead(step, params, state, reservoir)
        if step > self.delay and (step - self.delay) % int(every) == 0:
            reservoir = self._current("refresh", params, state, reservoir)
            chosen = self._chosen(step, reservoir)
            return self._apply(params, state, reservoir, self._reservoir(reservoir.theta, chosen))
        return params, state, reservoir

    def settled(self, reservoir: Reservoir) -> Reservoir:
        """The reservoir with what is being chosen ahead in it: what a checkpoint must hold."""
        if self._ahead is not None:
            reservoir = reservoir._replace(chosen=self._ahead.result())
        return reservoir

    def _chosen(self, step: int, reservoir: Reservoir) -> dict[str, Any]:
        if not self.delay:
            return self._choose(step, reservoir)
        if not reservoir.chosen:
            raise SparsityError(
                f"refresh: the choice made at step {step - self.delay} is not in this reservoir: "
                "what is saved must be AlwaysSparse.settled(reservoir)"
            )
        return reservoir.chosen

    def _choose(self, step: int, reservoir: Reservoir) -> dict[str, Any]:
        return hosts.in_parallel(
            lambda leaf, *of_leaf: hosts.choose(self.plan, leaf.leaf, step, *of_leaf),
            self._sparse, reservoir.theta, reservoir.sets, reservoir.memory,
        )  # fmt: skip

    def _choose_ahead(self, step: int, params: Tree, state: Any, reservoir: Reservoir) -> Reservoir:
        """Chooses in a thread, from a copy of the values that the next steps cannot take away.

        The reservoir that comes back holds no choice until the thread is done.
        """
        values = self._checked_values("refresh", params, state)
        copies = {name: jnp.copy(x) if _is_here(x) else _on_host(x) for name, x in values.items()}
        reservoir = hosts.writable(reservoir)._replace(chosen={})

        def choose() -> dict[str, Any]:
            self._scatter(copies, reservoir)
            return self._choose(step, reservoir)

        self._ahead = self._chooser.submit(hosts.as_precise_as_here(choose))
        return reservoir

    def _checked_values(self, what: str, params: Tree, state: Any) -> dict[str, Any]:
        """What a tree of values that belongs to an optimizer state holds of the sparse leaves."""
        compact = find_compact(state)
        if compact is None:
            raise SparsityError(f"{what}: this optimizer state is not the one that start returned")
        expected = [
            dense if leaf is None else _abstract_values(kernel, dense.dtype)
            for leaf, dense, kernel in zip(
                self._leaves, self._dense, self._treedef.flatten_up_to(compact.kernels), strict=True
            )
        ]
        leaves = leaves_like(what, params, self._treedef, self._names, expected)
        return {k: x for k, x in zip(self._names, leaves, strict=True) if k in self._sparse}

    def _current(self, what: str, params: Tree, state: Any, reservoir: Reservoir) -> Reservoir:
        """With θ made current, and the choice that was under way, which reads it, in it."""
        values = self._checked_values(what, params, state)
        reservoir = hosts.writable(self.settled(reservoir))
        # What others hold a part of is a collective: one at a time, the same order everywhere.
        here = {name: x if _is_here(x) else _on_host(x) for name, x in values.items()}
        self._scatter(here, reservoir)
        return reservoir

    def _scatter(self, values: dict[str, Any], reservoir: Reservoir) -> None:
        def write(leaf: HostLeaf, values: Any, theta: np.ndarray, flags: np.ndarray) -> None:
            leaf.scatter(theta, leaf.index(flags)[0], np.asarray(values))

        hosts.in_parallel(write, self._sparse, values, reservoir.theta, reservoir.sets)

    def _apply(
        self, params: Tree, state: T, old: Reservoir, new: Reservoir
    ) -> tuple[Tree, T, Reservoir]:
        """Brings new sets to the device: only what is new of them is sent."""
        self._ahead = None
        moves = hosts.in_parallel(HostLeaf.move, self._sparse, new.theta, old.sets, new.sets)
        for name, leaf in self._sparse.items():
            check_sizes(leaf.leaf, moves[name].forward, moves[name].source.shape[-1])
        arrays = self._treedef.flatten_up_to(params)
        twice = _held_twice((params, state))
        movers = [
            None if leaf is None else Mover(moves[name], leaf.leaf.stack, self._place, array, twice)
            for name, leaf, array in zip(self._names, self._leaves, arrays, strict=True)
        ]
        outside = map_parameter_shaped(
            lambda array, mover: mover.carry(array),
            _replace(state, CompactState, lambda _: None), params, self._treedef.unflatten(movers),
        )  # fmt: skip
        values = self._treedef.unflatten(
            array if mover is None else mover.values(array)
            for mover, array in zip(movers, arrays, strict=True)
        )
        inside = self._moved(movers, find_compact(state), values)  # type: ignore[arg-type]
        state = jax.tree.map(
            lambda old, new: inside if isinstance(old, CompactState) else new,
            state, outside, is_leaf=lambda node: isinstance(node, CompactState),
        )  # fmt: skip
        return values, state, new

    def _moved(
        self, movers: list[Mover | None], compact: CompactState, values: Tree
    ) -> CompactState:
        """Places and moments; those of fresh units are what `init` makes of the new values."""
        kernels = [
            old if mover is None else mover.places(old)
            for mover, old in zip(movers, self._treedef.flatten_up_to(compact.kernels), strict=True)
        ]
        by_path = jax.tree_util.tree_leaves_with_path(compact.inner_state)
        moved = dict(by_path)
        for number, mover in enumerate(movers):
            if mover is None:
                continue
            first = self._firsts[number](values)
            for path, array in by_path:
                if self._axes.get(path, (None,))[0] == number:
                    moved[path] = mover.moment(
                        array, first[jax.tree_util.keystr(path)], self._axes[path][1]
                    )
        inner = flatten(compact.inner_state)[1].unflatten(moved.values())
        return CompactState(compact.step, self._treedef.unflatten(kernels), inner)

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

        Raises:
          SparsityError: values or state of another run, or an inner optimizer whose state has no
            dense form.
        """
        reservoir = self._current("to_masked", params, state, reservoir)
        theta = self._treedef.unflatten(
            reservoir.theta[name] if leaf else _on_host(array)
            for name, leaf, array in zip(
                self._names, self._leaves, self._treedef.flatten_up_to(params), strict=True
            )
        )

        def spread(array: jax.Array, leaf: HostLeaf) -> np.ndarray:
            dense = np.zeros((*leaf.leaf.stack, *leaf.leaf.shape), array.dtype)
            flags = reservoir.sets[leaf.leaf.path]
            leaf.scatter(dense, leaf.index(flags)[0], _on_host(array))
            return dense

        sets = self.masks(reservoir)[1].sets

        def masked(compact: CompactState) -> SparsifyState:
            inner = compact.inner_state
            self._check_inner("to_masked", inner, self._treedef.unflatten(self._dense))
            return SparsifyState(compact.step, sets, dict(reservoir.memory), inner)

        bare = _replace(state, CompactState, lambda c: c._replace(kernels=None))
        leaves = self._treedef.unflatten(self._leaves)
        return theta, _replace(
            map_parameter_shaped(spread, bare, params, leaves), CompactState, masked
        )

    def from_masked(self, params: Tree, state: T) -> tuple[Tree, T, Reservoir]:
        """The inverse of `to_masked`: values, optimizer state and reservoir.

        Moments outside B, which the masked path may hold with `inner_state="keep"`, are dropped.

        Raises:
          SparsityError: `state` holds no masks, or sets of another size than the densities say;
            other parameters than those of `__init__`; an inner optimizer whose state has no compact
            form.
        """
        self._ahead = None
        theta = self._theta("from_masked", params)
        (masked,) = find_states(state)
        names, flags, _ = flatten_with_names(masked.sets)
        chosen = {
            name: (np.array(f, order="C"), jax.device_get(masked.memory[name]))
            for name, f in zip(names, flags, strict=True)
        }
        reservoir = self._reservoir(theta, chosen)
        kernels = self._kernels(params, reservoir)

        def gather(array: jax.Array, leaf: HostLeaf) -> jax.Array:
            index, _ = leaf.index(reservoir.sets[leaf.leaf.path])
            found = leaf.gather(np.asarray(array), index)
            return self._put(found.reshape(*leaf.leaf.stack, *found.shape[1:]))

        def compact(masked: SparsifyState) -> CompactState:
            inner = masked.inner_state
            self._check_inner("from_masked", inner, values_of(kernels))
            return CompactState(masked.step, _places(kernels), inner)

        leaves = self._treedef.unflatten(self._leaves)
        state = _replace(
            map_parameter_shaped(gather, state, params, leaves), SparsifyState, compact
        )
        return values_of(kernels), state, reservoir

    def _check_inner(self, what: str, found: Any, params: Tree) -> None:
        """Raises SparsityError unless an inner state is one that these parameters could have."""
        expected, _ = jax.tree_util.tree_flatten_with_path(
            jax.eval_shape(self.plan.inner.init, params)
        )
        shapes = {path: np.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(found)}
        for path, like in expected:
            if shapes.get(path) != like.shape:
                raise SparsityError(
                    f"{what}: the inner optimizer's state{jax.tree_util.keystr(path)} would have "
                    f"to turn from {shapes.get(path)} into {like.shape}: it has no such form"
                )


def _held_twice(tree: Any) -> Callable[[jax.Array], bool]:
    """Whether an array stands at more than one place of a tree."""
    times = Counter(map(id, jax.tree.leaves(tree)))
    return lambda array: times[id(array)] > 1


def _places(params: Tree) -> Tree:
    """The compact kernels without their values."""
    return jax.tree.map(
        lambda p: p.with_values(None) if is_compact(p) else optax.MaskedNode(),
        params,
        is_leaf=is_compact,
    )


def _abstract_values(kernel: CompactKernel, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*kernel.index.shape, *unit_shape(kernel.pattern)), dtype)


def _abstract_kernel(leaf: Leaf, dtype: Any, frozen: bool) -> CompactKernel:
    forward, backward = unit_counts(leaf, frozen)
    values = jax.ShapeDtypeStruct((*leaf.stack, backward, *unit_shape(leaf.pattern)), dtype)  # type: ignore[arg-type]
    index = jax.ShapeDtypeStruct((*leaf.stack, backward), jnp.int32)
    return CompactKernel(values, index, leaf.shape, leaf.pattern, forward)  # type: ignore[arg-type]


def _shaped(
    plan: Plan, leaf: Leaf, grad: jax.Array, values: jax.Array, kernel: CompactKernel
) -> jax.Array:
    for what, array in (("gradient", grad), ("values", values)):
        if jnp.shape(array) != (*kernel.index.shape, *unit_shape(kernel.pattern)):
            raise SparsityError(
                f"update: {what} of {leaf.path} must be of its {kernel.index.shape} units, found "
                f"shape {jnp.shape(array)}"
            )
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


def _is_here(array: Any) -> bool:
    """Whether this process can read all of it."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _on_host(array: Any) -> np.ndarray:
    """All of an array; a collective if other processes hold a part."""
    if _is_here(array):
        return np.asarray(array)
    everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(_replicated(everywhere)(array).addressable_data(0))


@functools.lru_cache
def _replicated(everywhere: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=everywhere)


def _replace(state: T, kind: type, function: Callable[[Any], Any]) -> T:
    """The optimizer state with each node of a kind replaced."""
    is_node = lambda node: isinstance(node, kind)  # noqa: E731
    return jax.tree.map(lambda n: function(n) if is_node(n) else n, state, is_leaf=is_node)
