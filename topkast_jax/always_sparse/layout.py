"""How one tree of parameters lies on the two sides: dense on the host, compact on the device."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax.always_sparse.checks import (
    check_reservoir,
    check_sizes,
    leaves_like,
    unit_counts,
)
from topkast_jax.always_sparse.host import HostLeaf, Reservoir, in_threads
from topkast_jax.always_sparse.kernel import CompactKernel, is_compact
from topkast_jax.errors import SparsityError
from topkast_jax.sets import SparsifyState, find_compact
from topkast_jax.sparsify import Plan, check_sparse
from topkast_jax.trees import columns_of, flatten_with_names

Tree = Any


class Layout:
    """The leaves of a tree of parameters, in flattening order.

    Attributes:
      names: of all leaves.
      dense: their dense shapes and types.
      leaves: what the host does with each, None where it is dense on the device too.
      sparse: those that are not, by name.
      theta_like: the dense shapes and types of those, by name.
    """

    def __init__(self, plan: Plan, params: Tree):
        self.names, arrays, self._treedef = flatten_with_names(params)
        self.dense = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in arrays]
        leaves = plan.leaves(params)
        self.leaves = [None if leaf is None else HostLeaf(p, leaf) for p, leaf in leaves.items()]
        self.sparse = {leaf.path: leaf for leaf in self.leaves if leaf}
        self.theta_like = self.of_sparse(self.dense)

    def flatten(self, tree: Tree) -> list[Any]:
        """What a tree of the parameters' structure holds for each leaf."""
        held: list[Any] = self._treedef.flatten_up_to(tree)
        return held

    def column(self, what: str, tree: Tree) -> list[Any]:
        """As `flatten`, of a tree of the user's; `what` names it in the error."""
        return list(columns_of(what, tree, self.names, self._treedef).values())

    def unflatten(self, leaves: Iterable[Any]) -> Tree:
        """The inverse of `flatten`."""
        return self._treedef.unflatten(leaves)

    def of_sparse(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """Of one item a leaf, those of the sparse leaves, by name."""
        return {k: x for k, x in zip(self.names, leaves, strict=True) if k in self.sparse}

    def abstract(self, frozen: bool) -> Tree:
        """Shapes and types of the tree with compact kernels; `frozen`: B is A."""
        return self.unflatten(
            dense if leaf is None else _abstract_kernel(leaf, dense.dtype, frozen)
            for leaf, dense in zip(self.leaves, self.dense, strict=True)
        )

    def theta(self, what: str, params: Tree, donate: bool = False) -> dict[str, np.ndarray]:
        """The sparse leaves of dense parameters, checked for `what`, on the host, to write to.

        A copy; with `donate`, the arrays themselves, or copies after each of which the original is
        deleted.
        """
        leaves = leaves_like(what, params, self._treedef, self.names, self.dense)
        theta: dict[str, np.ndarray] = {}
        holders = Counter(map(id, leaves))  # One array may stand for several leaves.
        for name, x, like in zip(self.names, leaves, self.dense, strict=True):
            if name not in self.sparse:
                continue
            if donate and isinstance(x, np.ndarray):
                taken = np.require(x, like.dtype, ["C", "W"])
                shared = any(np.may_share_memory(taken, other) for other in theta.values())
                theta[name] = taken.copy() if shared else taken
                continue
            theta[name] = np.array(x, like.dtype, order="C")
            holders[id(x)] -= 1
            if donate and isinstance(x, jax.Array) and not holders[id(x)]:
                x.delete()
        return theta

    def values(self, what: str, params: Tree, state: Any) -> dict[str, Any]:
        """Values of the sparse leaves, checked for `what` to belong to an optimizer state."""
        compact = find_compact(state)
        if compact is None:
            raise SparsityError(f"{what}: this optimizer state is not the one that start returned")
        expected = [
            dense if leaf is None else _abstract_values(kernel, dense.dtype)
            for leaf, dense, kernel in zip(
                self.leaves, self.dense, self.flatten(compact.kernels), strict=True
            )
        ]
        return self.of_sparse(leaves_like(what, params, self._treedef, self.names, expected))

    def indices(self, state: Any) -> dict[str, jax.Array]:
        """The indices of the units that the device holds, in their order, by sparse leaf."""
        compact: Any = find_compact(state)
        return {k: x.index for k, x in self.of_sparse(self.flatten(compact.kernels)).items()}

    def check_sparse(self, held: Mapping[str, Any]) -> None:
        """Raises SparsityError unless the sparse leaves are those of a masked state.

        `held` has something of each of the latter, by name.
        """
        leaves = {name: host.leaf for name, host in self.sparse.items()}
        check_sparse(leaves, self.names, {n: held.get(n, optax.MaskedNode()) for n in self.names})

    def write_back(
        self, theta: Mapping[str, np.ndarray], index: Mapping[str, Any], values: Mapping[str, Any]
    ) -> None:
        """Makes θ current on B: writes the values of its units, by sparse leaf, to it."""
        tasks = [
            leaf.writes(theta[name], np.asarray(index[name]), np.asarray(values[name]))
            for name, leaf in self.sparse.items()
        ]
        in_threads([task for of_leaf in tasks for task in of_leaf])

    def kernels(self, params: Tree, reservoir: Reservoir, put: Callable[[Any], jax.Array]) -> Tree:
        """The tree with compact kernels; dense leaves are those of `params`.

        `put` brings each array to the device, one leaf after another.
        """

        def kernel(name: str, leaf: HostLeaf | None, array: Any) -> Any:
            if leaf is None:
                return put(array)
            made = leaf.kernel(reservoir.theta[name], reservoir.sets[name])
            check_sizes(leaf, made.forward, made.backward)
            return jax.tree.map(put, made)

        rows = zip(self.names, self.leaves, self.flatten(params), strict=True)
        return self.unflatten(kernel(*row) for row in rows)

    def masks(self, reservoir: Reservoir) -> tuple[Tree, SparsifyState]:
        """Abstract dense parameters, and the sets in a masked run's state."""
        check_reservoir(reservoir, self.theta_like)
        sets = [reservoir.sets.get(name, optax.MaskedNode()) for name in self.names]
        state = SparsifyState(np.int32(0), self.unflatten(sets), {}, ())  # type: ignore[arg-type]
        return self.unflatten(self.dense), state


def places_of(params: Tree) -> Tree:
    """The compact kernels of a tree without their values, `MaskedNode()` for dense leaves."""
    return jax.tree.map(
        lambda p: p.with_values(None) if is_compact(p) else optax.MaskedNode(),
        params,
        is_leaf=is_compact,
    )


def _abstract_values(kernel: CompactKernel, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*kernel.index.shape, *kernel.pattern.unit_shape), dtype)


def _abstract_kernel(host: HostLeaf, dtype: Any, frozen: bool) -> CompactKernel:
    leaf = host.leaf
    forward, backward = unit_counts(host, frozen)
    values = jax.ShapeDtypeStruct((*leaf.stack, backward, *leaf.pattern.unit_shape), dtype)
    index = jax.ShapeDtypeStruct((*leaf.stack, backward), jnp.int32)
    return CompactKernel(values, index, leaf.shape, leaf.pattern, forward)  # type: ignore[arg-type]


def is_here(array: Any) -> bool:
    """Whether this process can read all of it."""
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def is_random_key(array: Any) -> bool:
    """Whether it holds typed random keys, for which NumPy has no type."""
    return isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def on_host(array: Any) -> np.ndarray:
    """All of an array; a collective if other processes hold a part."""
    if is_here(array):
        return np.asarray(array)
    everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    return np.asarray(_replicated(everywhere)(array).addressable_data(0))


@functools.lru_cache
def _replicated(everywhere: jax.sharding.Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=everywhere)
