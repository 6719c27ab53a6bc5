"""How sets are chosen from the parameters and the state alone, one leaf or many at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.errors import SparsityError, shown
from topkast_jax.flags import BACKWARD, first_flags, has, next_flags, unpack
from topkast_jax.method import Counts, Layer, Leaf, Method, Sets, allocates, enters_anew
from topkast_jax.serialization import serializable
from topkast_jax.varying import explicit_sharding, let_compiler_partition, varying_like

ByLeaf = dict[str, Any]
_TOGETHER = 2**22  # entries of leaves that are stacked, so that one program chooses for all
_FEW = 8  # stacked leaves that are chosen one by one


class Static:
    """A value that is a part of a tree's structure: equal values make equal structures."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and _same(self.value, other.value)

    def __hash__(self) -> int:
        try:
            return hash(self.value)
        except TypeError:  # a list, a dict, an array
            return hash(type(self.value))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # what cannot be compared is the same only if it is the same object
        return False


@dataclasses.dataclass(eq=False)  # Tools that walk a tree by types know dataclasses.
class Chooser:
    """What a state carries of the method, so that its sets follow from parameters and state.

    A tree: its numbers are arrays, and its structure says the rest. Two transformations that differ
    in numbers alone have states of equal structure.

    Attributes:
      numbers: the number attributes of the method, as scalars.
      counts: int32 scalars: the units that one layer keeps unless the method allocates, one pair
        for all leaves of one kind and densities.
      seed: uint32 scalar.
      frame: what is a part of the tree's structure: type and other attributes of the method, and
        whether it chooses again after the first choice.
      kinds: likewise: for each sparse leaf its path, its shape, type, pattern and stacked axes, and
        the place of its pair in `counts`.
    """

    numbers: Any
    counts: Any
    seed: Any
    frame: Static
    kinds: Static

    @classmethod
    def of(
        cls, method: Method, leaves: Mapping[str, Leaf], seed: Any, refreshes: bool = True
    ) -> Chooser:
        """The chooser of a method for these leaves, its numbers made arrays.

        `refreshes`: whether sets are chosen again after the first choice.
        """
        attributes = _attributes(method)
        numbers = {}
        for name, value in attributes.items():
            if isinstance(value, int) and not -(2**31) <= value < 2**31:
                raise SparsityError(
                    f"{type(method).__name__}.{name}={value}: must be an int32, as a state holds it"
                )
            if _is_number(value):
                numbers[name] = _as_scalar(value)
        others = {k: v for k, v in attributes.items() if k not in numbers}
        places: dict[Any, int] = {}
        counts: list[Counts] = []
        kinds = []
        for path, leaf in leaves.items():
            kind, densities = kind_of(leaf), (leaf.forward_density, leaf.backward_density)
            plain = all(isinstance(count, int) for count in leaf.counts)
            plain &= not any(isinstance(density, jax.Array) for density in densities)
            place = places.setdefault((Static(kind), densities) if plain else path, len(counts))
            if place == len(counts):
                counts.append(Counts(*(_as_scalar(count) for count in leaf.counts)))
            kinds.append((path, kind, place))
        frame = Static((type(method), others, refreshes))
        return cls(numbers, tuple(counts), seed_scalar(seed), frame, Static(kinds))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chooser) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # holds arrays

    @property
    def method(self) -> Method:
        """The method, its number attributes those of the state."""
        return method_of(self.frame, self.numbers)

    @property
    def refreshes(self) -> bool:
        """Whether sets are chosen again after the first choice."""
        return bool(self.frame.value[2])

    @property
    def leaves(self) -> dict[str, Leaf]:
        """The sparse leaves by path, their counts those of the state, without densities."""
        return {path: leaf_of(kind, self.counts[i]) for path, kind, i in self.kinds.value}

    def choose(
        self,
        first: bool,
        theta: ByLeaf,
        grads: ByLeaf | None,
        flags: ByLeaf | None,
        memory: ByLeaf | None,
        step: Any,
        keys: jax.Array | None = None,
    ) -> tuple[ByLeaf, ByLeaf]:
        """Flags and memory that the method chooses.

        Args:
          first: whether these are the first sets: ties are then broken at random.
          theta: parameters by leaf.
          grads: dense gradients by leaf, or None.
          flags: present flags by leaf; passed over at the first choice.
          memory: present memory by leaf; passed over at the first choice.
          step: finished steps.
          keys: the `keys` of this step, if they were computed before.
        """
        method, leaves = self.method, self.leaves
        if first:
            flags = memory = None
        by_leaf = dict(zip(leaves, self.keys(step) if keys is None else keys, strict=True))
        counts = allocated(method, leaves, theta, grads, flags, memory, by_leaf, step)
        columns: list[Any] = [theta, grads, flags, memory, counts]
        chosen_flags: ByLeaf = {}
        chosen_memory: ByLeaf = {}
        for paths in _alike(leaves, theta, memory):
            leaf = leaves[paths[0]]
            choose = functools.partial(choose_leaf, self.frame, leaf, first)
            for part in _parts(len(paths), leaf):
                rows = [[None if c is None else c[path] for c in columns] for path in paths[part]]
                own = [by_leaf[path] for path in paths[part]]
                if len(rows) == 1:
                    of_layers = layer_keys(own[0], leaf)
                    results = [_partitioned(choose)(*rows[0], of_layers, step, self.numbers)]
                else:
                    of_layers = layer_keys(jnp.stack(own), leaf)
                    results = _together(choose, rows, of_layers, step, self.numbers)
                for path, (new, remembered) in zip(paths[part], results, strict=True):
                    chosen_flags[path], chosen_memory[path] = new, remembered
        return self.as_chosen(theta, chosen_flags, chosen_memory)

    def keys(self, step: Any) -> jax.Array:
        """The random key of each leaf, `[leaves]`, after so many finished steps."""
        return leaf_keys(self.seed, [path for path, *_ in self.kinds.value], step)

    def as_chosen(self, theta: ByLeaf, flags: ByLeaf, memory: ByLeaf) -> tuple[ByLeaf, ByLeaf]:
        """The same, in the types in which `choose` returns them."""
        order = list(theta)
        return (
            {path: varying_like(flags[path], theta[path]) for path in order},
            {path: varying_like(memory[path], theta[path]) for path in order},
        )

    def first_memory(self, theta: ByLeaf) -> ByLeaf:
        """Zeros of the shapes and types of the memory that the first choice will return."""
        choose = functools.partial(self.choose, True)
        _, memory = jax.eval_shape(choose, theta, theta, None, None, np.int32(0))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)

    def entered(self, theta: ByLeaf, old: ByLeaf, new: ByLeaf) -> ByLeaf:
        """Parameters with what the method gives to entries that have just entered B."""
        method = self.method
        if not enters_anew(method):
            return theta
        result = {}
        for path, leaf in self.leaves.items():
            enters = has(new[path], BACKWARD) & ~has(old[path], BACKWARD)
            fresh = over_stack(lambda x, leaf=leaf: method.enter(x, leaf), leaf)(theta[path])
            result[path] = jnp.where(enters, fresh.astype(theta[path].dtype), theta[path])
        return result


def method_of(frame: Static, numbers: Mapping[str, Any]) -> Method:
    """The method of a `Chooser.frame` with these number attributes."""
    kind, others, _ = frame.value
    made: Method = object.__new__(kind)
    for name, value in (others | dict(numbers)).items():
        object.__setattr__(made, name, value)  # The class may be frozen.
    return made


def _attributes(method: Method) -> dict[str, Any]:
    """The attributes of a method, those in slots too."""
    slots = {
        name
        for kind in type(method).__mro__
        for name in np.atleast_1d(vars(kind).get("__slots__", ())).tolist()
        if hasattr(method, name)
    }
    return {name: getattr(method, name) for name in sorted(slots)} | vars(method)


def _flatten_with_keys(chooser: Chooser) -> tuple[Any, Any]:
    children = [(jax.tree_util.GetAttrKey(k), getattr(chooser, k)) for k in _CHILDREN]
    return children, (chooser.frame, chooser.kinds)


_CHILDREN = ("numbers", "counts", "seed")
jax.tree_util.register_pytree_with_keys(
    Chooser, _flatten_with_keys, lambda static, children: Chooser(*children, *static)
)


def allocated(
    method: Method,
    leaves: Mapping[str, Leaf],
    theta: ByLeaf,
    grads: ByLeaf | None,
    flags: ByLeaf | None,
    memory: ByLeaf | None,
    keys: ByLeaf,
    step: Any,
) -> dict[str, Counts]:
    """Counts of each leaf as the method allocates them, arrays of the stacked axes' shape."""
    counts: Mapping[str, Counts] = {path: leaf.counts for path, leaf in leaves.items()}
    if allocates(method):
        layers = {
            path: _whole_leaf(
                leaf,
                Layer(
                    theta[path],
                    None if grads is None else grads[path],
                    None if flags is None else flags[path],
                    None if memory is None else memory[path],
                    layer_keys(keys[path], leaf),
                    step,
                ),
            )
            for path, leaf in leaves.items()
        }
        at_densities = {path: _with_counts(leaf, leaf.counts) for path, leaf in leaves.items()}
        counts = method.allocate(layers, at_densities, step)
        if not isinstance(counts, Mapping) or set(counts) != set(leaves):
            raise SparsityError(
                f"{type(method).__name__}.allocate must return Counts for each of "
                f"{', '.join(leaves)}"
            )
    whole: dict[Any, Counts] = {}  # Leaves that share their counts go on sharing them.
    for path, leaf in leaves.items():
        pair = counts[path]
        if (id(pair), leaf.stack) not in whole:
            arrays = (jnp.broadcast_to(jnp.asarray(c, jnp.int32), leaf.stack) for c in pair)
            whole[id(pair), leaf.stack] = Counts(*arrays)
    return {path: whole[id(counts[path]), leaf.stack] for path, leaf in leaves.items()}


def _alike(leaves: Mapping[str, Leaf], theta: ByLeaf, memory: ByLeaf | None) -> list[list[str]]:
    """Paths of leaves that are alike, in the order of their first."""
    several = jax.device_count() > 1
    groups: dict[Any, list[str]] = defaultdict(list)
    for path, leaf in leaves.items():
        remembered = () if memory is None else memory[path]
        like = tuple((np.shape(m), jnp.result_type(m)) for m in jax.tree.leaves(remembered))
        # Among several devices, leaves of one role in different layers are sharded alike.
        role = re.sub(r"\d+", "#", path) if several else ""
        sharding = str(explicit_sharding(theta[path]))
        groups[(Static(kind_of(leaf)), like, sharding, role)].append(path)
    return list(groups.values())


def _parts(count: int, leaf: Leaf) -> list[slice]:
    """Cuts `count` leaves that are alike into parts that are stacked and chosen together.

    Compilers compile equal kernels once. In √n parts of √n leaves, the kernels that take a part out
    of all, and those that take a leaf out of a part, are the fewest.
    """
    most = _TOGETHER // max(1, math.prod(leaf.full_shape))
    size = max(1, min(math.isqrt(count - 1) + 1, most))
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def kind_of(leaf: Leaf) -> tuple[Any, ...]:
    """What two leaves must share to be chosen by one program."""
    return (leaf.shape, leaf.dtype, leaf.pattern, leaf.stack, leaf.axes)


def leaf_of(kind: tuple[Any, ...], counts: Counts) -> Leaf:
    """The inverse of `kind_of`, without densities."""
    shape, dtype, pattern, stack, axes = kind
    return Leaf(shape, dtype, pattern, None, None, counts, stack, axes)  # type: ignore[arg-type]


def _with_counts(leaf: Leaf, counts: Counts) -> Leaf:
    """The leaf with these counts, and densities that follow from them."""
    units = np.float32(math.prod(leaf.grid))
    densities = [jnp.asarray(c).astype(jnp.float32) / units for c in counts]
    return dataclasses.replace(
        leaf, forward_density=densities[0], backward_density=densities[1], counts=counts
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return jnp.issubdtype(value.dtype, np.integer) or jnp.issubdtype(value.dtype, np.floating)
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _as_scalar(value: Any) -> jax.Array:
    """A number as it is kept in a state: a copy, which may be donated without the caller's own."""
    whole = isinstance(value, int | np.integer) or jnp.issubdtype(
        jnp.result_type(value), jnp.integer
    )
    return jnp.array(value, jnp.int32 if whole else jnp.float32)


def seed_scalar(seed: Any) -> jax.Array:
    """A seed as it is kept in a state: a copy of its low 32 bits."""
    if isinstance(seed, int):
        return jnp.asarray(seed & 0xFFFFFFFF, jnp.uint32)
    return jnp.array(seed).astype(jnp.uint32)


def leaf_keys(seed: Any, paths: Sequence[str], step: Any) -> jax.Array:
    """Random keys of leaves, `[paths]`.

    The key of a leaf follows from its path, not from its position in the tree. Only under JAX's
    "unsafe_rbg" it depends on both: there, a key of several made at once is not that made alone.
    """
    numbers = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    # Made outside, because jit does not see that `jax.default_prng_impl` has changed.
    return _leaf_keys(jax.random.key(seed), numbers, step)


# One program for all trees of so many leaves. Without `jit`, vmap around or inside `shard_map`
# would have `fold_in` mark the numbers as varying twice.
@jax.jit
def _leaf_keys(key: jax.Array, numbers: Any, step: Any) -> jax.Array:
    fold = jax.random.fold_in
    keys: jax.Array = jax.vmap(lambda number: fold(fold(key, number), step))(numbers)
    return keys


def layer_keys(keys: jax.Array, leaf: Leaf) -> jax.Array:
    """Random keys of the layers of leaves that are like `leaf`, `[..., *stack]`, from theirs."""
    split = functools.partial(jax.random.split, num=leaf.stack)
    if not leaf.stack:
        return keys
    return jax.vmap(split)(keys) if keys.ndim else split(keys)


def choose_leaf(
    frame: Static,
    leaf: Leaf,
    first: bool,
    theta: Any,
    grad: Any,
    flags: Any,
    memory: Any,
    counts: Counts,
    keys: Any,
    step: Any,
    numbers: Any,
) -> tuple[Any, Any]:
    """Flags and memory of one leaf; `counts` and `keys` have the shape of the stacked axes.

    `frame` and `numbers` are the method's. Its numbers are arguments, as all arrays are: on a mesh
    with explicit axes, what a function closes over cannot be used inside `auto_axes`.
    """
    method = method_of(frame, numbers)

    def choose(theta: Any, grad: Any, flags: Any, memory: Any, key: Any, counts: Counts) -> Any:
        sets = None if first else _by_unit(leaf, flags)
        layer = Layer(theta, grad, sets, None if first else memory, key, step)
        here = _with_counts(leaf, counts)
        new, remembered = _checked(method, leaf, method.choose(layer, here, counts), layer.memory)
        forward, backward = (leaf.pattern.expand(s, leaf.shape) for s in new)
        entries = Sets(forward, forward | backward)
        chosen = first_flags(entries) if first else next_flags(flags, entries)
        # Nothing is below -∞. It shows the partitioner that flags lie where θ does, also where the
        # sets do not depend on θ.
        return chosen | (theta < -jnp.inf).astype(chosen.dtype), remembered

    return over_stack(choose, leaf)(theta, grad, flags, memory, keys, counts)


def over_stack(function: Callable[..., Any], leaf: Leaf) -> Callable[..., Any]:
    """`function` of one layer's arrays, mapped over the stacked axes of a leaf.

    Arrays of the leaf's full shape have the stacked axes where the leaf has them, all others in
    front.
    """
    if not leaf.stack:
        return function
    front = range(len(leaf.axes))

    def to_front(x: Any) -> Any:
        return jnp.moveaxis(x, leaf.axes, front) if jnp.shape(x) == leaf.full_shape else x

    in_front = leaf.stack + leaf.shape

    def back(x: Any) -> Any:
        return jnp.moveaxis(x, front, leaf.axes) if jnp.shape(x) == in_front else x

    mapped = function
    for _ in leaf.stack:
        mapped = jax.vmap(mapped)
    if leaf.axes == tuple(front):
        return mapped
    return lambda *args: jax.tree.map(back, mapped(*jax.tree.map(to_front, args)))


def _whole_leaf(leaf: Leaf, layer: Layer) -> Layer:
    """A whole leaf as `allocate` sees it: stacked axes in front, flags read as sets by unit."""
    front = range(len(leaf.axes))

    def to_front(x: Any) -> Any:
        return None if x is None else jnp.moveaxis(x, leaf.axes, front)

    by_unit: Callable[..., Any] = functools.partial(_by_unit, leaf)
    for _ in leaf.stack:
        by_unit = jax.vmap(by_unit)
    return layer._replace(
        theta=to_front(layer.theta),
        grad=to_front(layer.grad),
        sets=None if layer.sets is None else by_unit(to_front(layer.sets)),
        memory=jax.tree.map(
            lambda m: to_front(m) if jnp.shape(m) == leaf.full_shape else m, layer.memory
        ),
    )


def _by_unit(leaf: Leaf, flags: jax.Array) -> Sets:
    """The sets of one layer by unit."""
    entries = unpack(flags)
    if leaf.grid == leaf.shape:
        return entries
    return Sets(*(leaf.pattern.magnitudes(mask.astype(jnp.float32)) > 0 for mask in entries))


def _checked(method: Method, leaf: Leaf, result: Any, held: Any) -> tuple[Sets, Any]:
    """What `choose` returned, if it is a pair of sets and a memory like the one that is held."""
    name = f"{type(method).__name__}.choose"
    pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], tuple)
    if not pair or len(result[0]) != 2:
        raise SparsityError(f"{name} returned {shown(result)}; must return (Sets, memory)")
    sets, memory = result
    for mask in sets:
        if jnp.shape(mask) != leaf.grid or jnp.result_type(mask) != jnp.bool_:
            raise SparsityError(
                f"{name} returned a set of type {jnp.result_type(mask)} and shape "
                f"{jnp.shape(mask)}; must be bool by unit, shape {leaf.grid}"
            )
    if held is not None and _shapes(memory) != _shapes(held):
        raise SparsityError(
            f"{name} returned a memory of {_shapes(memory)}; must be like that of the first "
            f"choice, {_shapes(held)}"
        )
    return Sets(*sets), memory


def _shapes(memory: Any) -> Any:
    """A tree with the shapes and types of its leaves in their place."""
    return jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}", memory)


def _together(
    choose: Callable[..., Any], rows: list[list[Any]], keys: jax.Array, step: Any, numbers: Any
) -> list[tuple[Any, Any]]:
    """Chooses for leaves of one kind by one program, stacked along a new axis in front.

    It takes them in two turns or more, a few one by one: a compiler would dissolve a loop of one
    turn, and then compute and compile the last lines of a choice anew for every leaf.
    """
    count = len(rows)
    turns = 2 if count > _FEW else count
    each = -(-count // turns)

    def in_turns(x: jax.Array) -> jax.Array:
        full = jnp.concatenate([x, x[-1:]]) if turns * each > count else x
        return full.reshape(turns, each, *x.shape[1:])

    def run(*args: Any) -> Any:
        *stacked, step, numbers = args
        mapped = jax.vmap(lambda xs: choose(*xs, step, numbers))
        return jax.lax.map(mapped, jax.tree.map(in_turns, tuple(stacked)))

    stacked = jax.tree.map(_stacked, *rows)
    flags, memory = _partitioned(run)(*stacked, keys, step, numbers)

    def of(i: int) -> Any:
        return jax.tree.map(lambda x: x[i // each, i % each], (flags, memory))

    return [of(i) for i in range(count)]


def _stacked(*xs: Any) -> jax.Array:
    if all(x is xs[0] for x in xs):
        return jnp.broadcast_to(xs[0], (len(xs), *jnp.shape(xs[0])))
    return jnp.stack(xs)


def _partitioned(choose: Callable[..., Any]) -> Callable[..., Any]:
    """`choose`, with a leaf that is explicitly sharded left to the compiler."""

    def run(theta: Any, *rest: Any) -> Any:
        sharding = explicit_sharding(theta)
        if sharding is None:
            return choose(theta, *rest)
        like = jax.sharding.NamedSharding(sharding.mesh, sharding.spec)
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())

        def shardings(results: Any) -> Any:
            return jax.tree.map(lambda r: like if r.shape == theta.shape else whole, results)

        return let_compiler_partition(choose, shardings, sharding.mesh)(theta, *rest)

    return run


serializable(
    Chooser,
    _CHILDREN,
    lambda chooser, children: Chooser(**children, frame=chooser.frame, kinds=chooser.kinds),
)
