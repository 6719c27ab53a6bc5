"""Parameter trees as columns of leaves, with readable names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from topkast_jax.errors import SparsityError


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as "a/b/0"; the ".value" of a Flax variable is left out.

    So a leaf has one name in a tree of `nnx.Param`, in the same tree of plain arrays, and in the
    one of optimizer variables that `nnx.Optimizer` makes.
    """
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    is_attribute = isinstance(path[-1], jax.tree_util.GetAttrKey) if path else False
    if len(names) > 1 and is_attribute and names[-1] in ("value", "raw_value"):
        names.pop()
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
    """Names, leaves and structure."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    names = [path_name(path) for path, _ in paths_and_leaves]
    return names, [leaf for _, leaf in paths_and_leaves], treedef


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
        raise SparsityError(
            f"{what} must have the structure of the parameters; "
            f"missing: {_some(missing)}; unknown: {_some(more)}"
        ) from None
    return dict(zip(names, held, strict=True))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "none"
