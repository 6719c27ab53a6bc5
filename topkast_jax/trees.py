"""Parameter trees as columns of leaves, with readable names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from topkast_jax.errors import SparsityError


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as "a/b/0"."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return "/".join(name.lstrip(".") for name in names)


def without_variables(tree: Any) -> Any:
    """The tree with each Flax NNX variable replaced by its array: `nnx.Optimizer` holds those."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree

    def is_variable(node: Any) -> bool:
        return isinstance(node, nnx.Variable)

    return jax.tree.map(
        lambda node: node.get_raw_value() if is_variable(node) else node, tree, is_leaf=is_variable
    )


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Leaves and structure."""
    return jax.tree.flatten(tree)


def flatten_with_names(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[str], list[Any], Any]:
    """Names, leaves and structure; the level of a Flax variable is left out of the names.

    So a leaf has one name in a tree of `nnx.Param`, in the same tree of plain arrays, and in the
    one of optimizer variables that `nnx.Optimizer` makes. The same holds for the boxes of Flax
    linen that carry partitioning metadata.
    """
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    paths = [path for path, _ in paths_and_leaves]
    if any(map(_may_be_wrapped, paths)):
        wrappers = _wrapper_paths(tree, is_leaf)
        paths = [p[:-1] if _may_be_wrapped(p) and _text(p[:-1]) in wrappers else p for p in paths]
    return list(map(path_name, paths)), [leaf for _, leaf in paths_and_leaves], treedef


def _may_be_wrapped(path: Sequence[Any]) -> bool:
    """Whether a path ends as that of the array inside a Flax variable does."""
    last = path[-1] if len(path) > 1 else None
    return isinstance(last, jax.tree_util.GetAttrKey) and last.name in ("value", "raw_value")


def _wrapper_paths(tree: Any, is_leaf: Callable[[Any], bool] | None) -> set[tuple[str, ...]]:
    """The paths of the Flax variables and boxes in a tree."""
    homes = (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata"))
    found = (getattr(sys.modules.get(module), name, None) for module, name in homes)
    kinds = tuple(kind for kind in found if kind is not None)

    def stops(node: Any) -> bool:
        return isinstance(node, kinds) or (is_leaf is not None and is_leaf(node))

    nodes = jax.tree_util.tree_flatten_with_path(tree, stops)[0]
    return {_text(path) for path, node in nodes if isinstance(node, kinds)}


def _text(path: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(str, path))


def columns_of(what: str, tree: Any, names: Sequence[str], treedef: Any) -> dict[str, Any]:
    """What a tree of the parameters' structure holds for each leaf, by name.

    Raises:
      SparsityError: the tree has another structure; `what` names it.
    """
    try:
        held = treedef.flatten_up_to(tree)
    except (ValueError, TypeError):
        found = flatten_with_names(tree)[0]
        missing = [name for name in names if name not in found]
        more = [name for name in found if name not in names]
        difference = f"missing: {_some(missing)}; unknown: {_some(more)}"
        if not missing and not more:
            difference = _other_container(jax.tree.structure(tree), treedef)
        raise SparsityError(
            f"{what} must have the structure of the parameters; {difference}"
        ) from None
    return dict(zip(names, held, strict=True))


def _other_container(found: Any, wanted: Any) -> str:
    """The first node of a tree that is of another type than in a tree with the same leaves."""
    here, there = (tree.node_data() for tree in (found, wanted))
    if here is not None and there is not None and here[0] is not there[0]:
        return f"found a {here[0].__name__}, must be a {there[0].__name__}"
    pairs = zip(found.children(), wanted.children(), strict=False)
    return next(filter(None, (_other_container(*pair) for pair in pairs)), "")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "none"
