"""The states of sparse training, and the views that are read from them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topkast_jax.choosing import Chooser
from topkast_jax.errors import SparsityError
from topkast_jax.flags import BACKWARD, FORWARD, has
from topkast_jax.method import Leaf
from topkast_jax.trees import flatten_with_names, without_variables

NOT_DUE = 0
DUE = 1
DUE_WITH_GRADIENT = 2


class SparsifyState(NamedTuple):
    """State of `sparsify`.

    Sets are chosen from the parameters that come with the state: where a choice is due,
    `forward_params(params, state)` and the `update` that follows make the same one. Inside one
    compiled function the compiler makes it once.

    Attributes:
      step: int32 scalar, finished steps.
      sets: tree of the parameters' structure; a sparse leaf holds uint8 of the parameter's shape,
        one bit for each set (`FORWARD`, `BACKWARD`, …) an entry is in; a dense leaf MaskedNode().
      memory: what the method remembers, by the name of each sparse leaf.
      inner_state: the inner optimizer's state.
      due: int8 scalar: `DUE` where the sets are to be chosen from the next parameters,
        `DUE_WITH_GRADIENT` where the next update chooses the first ones, else `NOT_DUE`.
      gradient: the last dense gradients, a tree like `sets`, if the method needs them; else ().
      chooser: how the sets are chosen, a `Chooser`; () if they never are again.
    """

    step: jax.Array
    sets: Any
    memory: Any
    inner_state: Any
    due: Any = NOT_DUE
    gradient: Any = ()
    chooser: Any = ()


def is_dense(node: Any) -> bool:
    """Whether a node of `SparsifyState.sets` stands for a dense leaf."""
    return isinstance(node, optax.MaskedNode)


class CompactState(NamedTuple):
    """State of the always-sparse transform: what the device holds in addition to the values of B.

    Attributes:
      step: int32 scalar, finished steps.
      kernels: tree of the parameters' structure; a sparse leaf holds its compact kernel without
        values (the indices of its units), a dense leaf MaskedNode().
      inner_state: the inner optimizer's state, over the tree of values.
    """

    step: jax.Array
    kernels: Any
    inner_state: Any


def nodes_of(state: Any, kind: type) -> list[Any]:
    """The nodes of a kind inside an optimizer state, wherever they sit."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def find_compact(state: Any) -> CompactState | None:
    """The `CompactState` inside an optimizer state, wherever it sits, or None."""
    return next(iter(nodes_of(state, CompactState)), None)


def find_states(state: Any) -> list[SparsifyState]:
    """Every `SparsifyState` inside an optimizer state, wherever it sits.

    Raises:
      SparsityError: there is none, or an always-sparse one, whose sets are on the host.
    """
    found = nodes_of(state, SparsifyState)
    if not found and find_compact(state) is not None:
        raise SparsityError(
            "this optimizer state is always sparse, and its sets are on the host: take "
            "AlwaysSparse.masks(reservoir), parameters and sets, in place of parameters and state"
        )
    if not found:
        raise SparsityError(
            "this optimizer state holds no sparsity state: make it with top_kast(...).init or "
            "another method's"
        )
    return found


class Present(NamedTuple):
    """The sparse leaves of one state as they are for the parameters that came with it.

    Attributes:
      theta: parameters by leaf, with what `Method.enter` gives to entries that have just entered.
      flags: the sets in use by leaf.
      memory: what the method remembers by leaf.
      was: the sets before the choice that was due, by leaf; `flags` itself if none was.
    """

    theta: dict[str, Any]
    flags: dict[str, Any]
    memory: Any
    was: dict[str, Any]


def present(
    thetas: dict[str, Any], state: SparsifyState, gradients: dict[str, Any] | None = None
) -> Present:
    """Makes the choice that is due, from these parameters.

    Args:
      thetas: parameters by leaf; those of dense leaves are passed over.
      state: as the last update returned it.
      gradients: by leaf, inside an update: a first choice that waits for them is made too.

    Raises:
      SparsityError: a leaf of another shape or type than the state was made for.
    """
    flags = leaf_flags(state)
    _check_shapes(thetas, flags)
    theta = {path: thetas[path] for path in flags}
    if not isinstance(state.chooser, Chooser):
        return Present(theta, flags, state.memory, flags)
    chooser: Chooser = state.chooser
    new, memory = flags, state.memory
    if chooser.refreshes:
        _check_types(theta, chooser.leaves)
        stored = _by_leaf(state.gradient) if chooser.method.needs_gradient else None
        new, memory = _chosen_if(
            chooser, False, state.due == DUE, theta, stored, flags, memory, state.step
        )
    if gradients is not None and chooser.method.first_choice == "first_update":
        first = {path: gradients[path] for path in flags}
        waiting = state.due == DUE_WITH_GRADIENT
        new, memory = _chosen_if(chooser, True, waiting, theta, first, new, memory, state.step)
    return Present(chooser.entered(theta, flags, new), new, memory, flags)


def leaf_flags(state: SparsifyState) -> dict[str, Any]:
    """The flags of each sparse leaf, by its name."""
    return _by_leaf(state.sets)


def _by_leaf(tree: Any) -> dict[str, Any]:
    names, leaves, _ = flatten_with_names(tree)
    return dict(zip(names, leaves, strict=True))


@functools.partial(jax.jit, static_argnums=1)
def _chosen_if(
    chooser: Chooser,
    first: bool,
    due: Any,
    theta: Any,
    grads: Any,
    flags: Any,
    memory: Any,
    step: Any,
) -> Any:
    # The choice has no derivative: a set is a set of integers.
    theta, grads = jax.lax.stop_gradient((theta, grads))
    return jax.lax.cond(
        due,
        lambda: chooser.choose(first, theta, grads, flags, memory, step),
        lambda: chooser.as_chosen(theta, flags, memory),
    )


def _check_shapes(thetas: dict[str, Any], flags: dict[str, Any]) -> None:
    strangers = [path for path in flags if path not in thetas]
    if strangers:
        raise SparsityError(f"the state is of other parameters: these lack {', '.join(strangers)}")
    for path, held in flags.items():
        if jnp.shape(thetas[path]) != jnp.shape(held):
            raise SparsityError(
                f"{path} has shape {jnp.shape(thetas[path])} and this state is of parameters where "
                f"it has shape {jnp.shape(held)}"
            )


def _check_types(thetas: dict[str, Any], leaves: dict[str, Leaf]) -> None:
    for path, leaf in leaves.items():
        if (found := jnp.result_type(thetas[path])) != leaf.dtype:
            raise SparsityError(
                f"{path} is {found} and this state is of {leaf.dtype} parameters, whose selection "
                "may be another: take the forward view of these, and cast that"
            )


def presents(params: Any, state: Any) -> Present:
    """`present` of every sparsity state inside an optimizer state, put together.

    Raises:
      SparsityError: `state` holds no sparsity state, one of other parameters, or two of one leaf.
    """
    found = find_states(state)
    names, leaves, _ = flatten_with_names(params)
    thetas = dict(zip(names, leaves, strict=True))
    together = Present({}, {}, {}, {})
    for one in map(without_variables, found):
        now = present(thetas, one)
        twice = [path for path in now.flags if path in together.flags]
        if twice:
            raise SparsityError(
                f"{twice[0]} is sparse in two sparsity states: one method to a leaf, and one "
                "wrapper in a chain"
            )
        if any(isinstance(flags, jax.core.Tracer) for flags in now.flags.values()):
            now = now._replace(flags=_reading(now.memory, now.flags, one.step))
        for whole, part in zip(together, now, strict=True):
            whole.update(part if isinstance(part, dict) else {})
    return together


def _reading(memory: Any, flags: dict[str, Any], step: Any) -> dict[str, Any]:
    """The same flags, in a way that the compiler takes to depend on the memory as well.

    It merges the choice of `forward_params` with that of the `update` that follows only if both
    read the same results of it. No step is negative, so the memory never shows.
    """
    never = jnp.asarray(step) < 0

    def read(path: str, flags: Any) -> Any:
        for remembered in jax.tree.leaves(memory.get(path, ())):
            same_shape = jnp.shape(remembered) == jnp.shape(flags)
            seen = remembered != 0 if same_shape else jnp.any(remembered != 0)
            flags = flags | (never & seen).astype(flags.dtype)
        return flags

    return {path: read(path, held) for path, held in flags.items()}


def map_flags(function: Callable[[Any, Any], Any], params: Any, state: Any) -> Any:
    """Maps `function(flags, parameter)` over the leaves; flags are None where a leaf is dense."""
    now = presents(params, state)
    names, leaves, treedef = flatten_with_names(params)
    return treedef.unflatten([
        function(now.flags.get(name), now.theta.get(name, leaf))
        for name, leaf in zip(names, leaves, strict=True)
    ])  # fmt: skip


def forward_params(params: Any, state: Any) -> Any:
    """The parameters the network runs on: θ on the forward set, 0 elsewhere (the paper's α).

    Args:
      params: tree of parameters; always sparse, of values.
      state: the optimizer state they are trained with: `sparsify`'s, or any that holds it.

    Returns:
      A tree like `params`; dense leaves are the same arrays. Always sparse, sparse leaves are
      compact kernels, whose products run over the forward set.

    Raises:
      SparsityError: `state` holds no sparsity state, or one of other parameters, or `params` are
        not the values that an always-sparse one belongs to.
    """
    compact = find_compact(state)
    if compact is not None:
        return _with_kernels(params, compact.kernels)

    def view(flags: Any, theta: jax.Array) -> jax.Array:
        if flags is None:
            return theta
        return jnp.where(has(flags, FORWARD), theta, jnp.zeros_like(theta))

    return map_flags(view, params, state)


def _with_kernels(params: Any, kernels: Any) -> Any:
    """The tree with compact kernels for values; as it is if it holds kernels already."""
    if any(map(_is_kernel, jax.tree.leaves(params, is_leaf=_is_kernel))):
        return params
    names, values, treedef = flatten_with_names(params)
    rows = zip(names, values, treedef.flatten_up_to(kernels), strict=True)
    return treedef.unflatten(
        x if is_dense(kernel) else kernel.with_values(_fitting(name, x, kernel.index))
        for name, x, kernel in rows
    )


def _is_kernel(node: Any) -> bool:
    return hasattr(node, "with_values")


def _fitting(name: str, values: Any, index: Any) -> Any:
    if jnp.shape(values)[: index.ndim] != index.shape:
        raise SparsityError(
            f"{name} has shape {jnp.shape(values)} and this always-sparse state is of values "
            f"{index.shape}: take the tree of values that came with the state"
        )
    return values


def keep_masks(params: Any, state: Any) -> tuple[Any, Any]:
    """The forward and backward sets as trees of bool arrays, all True for dense leaves.

    Args:
      params: tree of parameters.
      state: the optimizer state they are trained with.

    Returns:
      (forward, backward), each a tree like `params`.

    Raises:
      SparsityError: `state` holds no sparsity state, or one of other parameters, or an
        always-sparse one: there it is ``keep_masks(*sparse.masks(reservoir))``.
    """
    now = presents(params, state)
    names, leaves, treedef = flatten_with_names(params)

    def mask(bit: int) -> Any:
        return treedef.unflatten([
            has(now.flags[name], bit)
            if name in now.flags
            else jnp.ones(jnp.shape(leaf), bool)
            for name, leaf in zip(names, leaves, strict=True)
        ])  # fmt: skip

    return mask(FORWARD), mask(BACKWARD)


def value_and_grad(
    function: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """The loss and its gradient at the forward view, in one call.

    Args:
      function: called as ``function(alpha, *args, **kwargs)`` with the forward view of the
        parameters in place of the parameters.
      has_aux: whether it returns a pair of loss and auxiliary data.

    Returns:
      A function of ``(params, state, *args, **kwargs)`` that returns what
      ``jax.value_and_grad(function)(forward_params(params, state), *args, **kwargs)`` does. The
      gradient is the one that the update of a sparsity method takes. Always sparse, it is the
      gradient of the values, a tree like `params`.

    Raises:
      SparsityError: from the returned function, as `forward_params`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import topkast_jax as tk
      >>> params = {"w": jnp.arange(1.0, 11.0).reshape(2, 5)}
      >>> tx = tk.top_kast(optax.sgd(0.1), 0.1, 0.2, rules=[(".*", tk.Sparse())])
      >>> state = tx.init(params)
      >>> loss, grads = tk.value_and_grad(lambda p: jnp.sum(p["w"]))(params, state)
      >>> float(loss)
      10.0
    """

    def at_values(values: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        return function(forward_params(values, state), *args, **kwargs)

    inner = jax.value_and_grad(function, has_aux=has_aux)
    of_values = jax.value_and_grad(at_values, has_aux=has_aux)

    @functools.wraps(function)
    def at_forward_view(params: Any, state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if find_compact(state) is not None:
            result: tuple[Any, Any] = of_values(params, state, *args, **kwargs)
        else:
            result = inner(forward_params(params, state), *args, **kwargs)
        return result

    # `jax.jit` finds static arguments by it.
    at_forward_view.__signature__ = _with_state(function)  # type: ignore[attr-defined]
    return at_forward_view


def _with_state(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function of parameters and more, with a state after the parameters."""
    first = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY)
        for name in ("_params", "_opt_state")
    ]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Of some builtins, nothing is known.
        rest = [inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)]
        return inspect.Signature(first + rest)
    rest = list(signature.parameters.values())
    if rest and rest[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        rest = rest[1:]
    return signature.replace(parameters=first + rest)
