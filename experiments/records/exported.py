"""The file of an exported run, as `.safetensors` or `.npz`.

A dense leaf is one array, NAME. A sparse leaf is stored by form: `dense`, one array, zero outside
A; `compact`, NAME.values and NAME.index; `bcoo`, NAME.data and NAME.indices; `bsr`, NAME.data,
NAME.indices and NAME.indptr (see `topkast_jax.always_sparse.export`). What the model carries
besides its parameters (batch statistics) is under `model_state/`. The file's metadata, `topkast`
as JSON, holds the form, the config, and the shape and the pattern of each sparse leaf.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental.sparse import BCOO, BCSR

from experiments.errors import UserError
from experiments.records import workdir
from experiments.training.methods import pattern_text, read_pattern
from topkast_jax.always_sparse import CompactKernel, is_compact
from topkast_jax.trees import flatten_with_names

METADATA = "topkast"
STATE = "model_state/"
SUFFIXES = (".safetensors", ".npz")


def check_path(out: Path) -> None:
    """Raises UserError unless a new file can be written there."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out={out}: must end in {' or '.join(SUFFIXES)}")
    if out.exists():
        raise UserError(f"--out={out}: exists; nothing is written over")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: cannot be written: there is no folder {out.parent}")


def save(out: Path, tree: Any, form: str, config: dict[str, Any], model_state: Any = None) -> None:
    """Writes the whole file or nothing.

    Args:
        out: a path that `check_path` accepts.
        tree: the exported parameters.
        form: the form of their sparse leaves.
        config: the config of the run, for the metadata.
        model_state: what the model carries besides; None for nothing.
    """
    arrays, leaves = _flat(tree)
    names, values, _ = flatten_with_names({} if model_state is None else model_state)
    arrays |= {STATE + n: np.asarray(v) for n, v in zip(names, values, strict=True)}
    _save(out, arrays, json.dumps({"form": form, "leaves": leaves, "config": config}))


def load(path: Path, at_most: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads an exported file.

    Args:
        path: a file that `save` wrote.
        at_most: how many bytes its arrays may take in memory, looked at before they are read.

    Returns:
        The tree of parameters as exported (nested dicts), and the metadata; the model state is in
        the tree's entry `model_state`, if there is one.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    if not path.is_file():
        reason = "is no file" if path.exists() else "no such file"
        raise UserError(f"{path}: {reason}; must be a file from experiments.export")
    try:
        arrays, text = _read(path, math.inf if at_most is None else at_most)
        if text is None:
            raise ValueError(f"no {METADATA!r} in it")
        metadata = workdir.parsed(text)
        read = _SPARSE[metadata["form"]]
        for name, about in metadata["leaves"].items():
            parts = {k: arrays.pop(f"{name}.{k}") for k in _PARTS[metadata["form"]]}
            arrays[name] = read(parts, about)
        dict(metadata["config"])
        return _nested(arrays), metadata
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (
        ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError,
        RuntimeError, zipfile.BadZipFile, zlib.error, safetensors.SafetensorError, UserError,
    ) as error:  # fmt: skip
        told = f"lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path}: was not written by experiments.export: {told}") from error


def _read(path: Path, at_most: float) -> tuple[dict[str, Any], str | None]:
    if path.suffix != ".npz":
        with safetensors.safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, (file.metadata() or {}).get(METADATA)
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > at_most:
        raise ValueError(f"it unpacks to {size} bytes; must be at most {at_most}")
    with np.load(path) as file:
        arrays = dict(file)
    text = arrays.pop(METADATA, None)
    return arrays, None if text is None else str(text)


def _compact(parts: dict[str, Any], about: dict[str, Any]) -> CompactKernel:
    values, index, shape = parts["values"], parts["index"], tuple(about["shape"])
    pattern: Any = read_pattern(about["pattern"])
    if values.shape != (*index.shape, *pattern.unit_shape):
        raise ValueError(f"values {values.shape} for an index {index.shape} of {pattern}")
    _check_within(index, math.prod(pattern.grid(shape)))
    return CompactKernel(values, index, shape, pattern, index.shape[-1])


def _bcoo(parts: dict[str, Any], about: dict[str, Any]) -> BCOO:
    shape, indices = tuple(about["shape"]), parts["indices"]
    _check_within(indices, np.array(shape[len(shape) - indices.shape[-1] :]))
    return BCOO((parts["data"], indices), shape=shape)


def _bsr(parts: dict[str, Any], about: dict[str, Any]) -> BCSR:
    shape, stacked = tuple(about["shape"]), parts["indptr"].ndim - 1
    _check_within(parts["indices"], shape[stacked + 1])
    _check_within(parts["indptr"], parts["indices"].shape[-1] + 1)
    return BCSR(tuple(parts[k] for k in ("data", "indices", "indptr")), shape=shape)


def _check_within(index: Any, below: Any) -> None:
    if index.dtype.kind not in "iu" or (index < 0).any() or (index >= below).any():
        raise ValueError(f"an index outside its leaf, or of type {index.dtype}")


_SPARSE: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "dense": lambda parts, about: None,
    "compact": _compact,
    "bcoo": _bcoo,
    "bsr": _bsr,
}
_PARTS = {
    "dense": (),
    "compact": ("values", "index"),
    "bcoo": ("data", "indices"),
    "bsr": ("data", "indices", "indptr"),
}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _flat(tree: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by name, and what must be known besides of each sparse leaf."""
    arrays: dict[str, np.ndarray] = {}
    leaves: dict[str, Any] = {}
    names, nodes, _ = flatten_with_names(tree, _is_leaf)
    for name, leaf in zip(names, nodes, strict=True):
        if not _is_leaf(leaf):
            arrays[name] = np.asarray(leaf)
        elif isinstance(leaf, CompactKernel):
            arrays[f"{name}.values"] = np.asarray(leaf.values)
            arrays[f"{name}.index"] = np.asarray(leaf.index)
            leaves[name] = {"shape": leaf.shape, "pattern": pattern_text(leaf.pattern)}
        else:
            parts = ("data", "indices", *(("indptr",) if isinstance(leaf, BCSR) else ()))
            arrays |= {f"{name}.{part}": np.asarray(getattr(leaf, part)) for part in parts}
            leaves[name] = {"shape": leaf.shape}
    return {name: np.ascontiguousarray(x) for name, x in arrays.items()}, leaves


def _is_leaf(node: Any) -> bool:
    return is_compact(node) or isinstance(node, BCOO | BCSR)


def _save(out: Path, arrays: dict[str, np.ndarray], metadata: str) -> None:
    try:
        with workdir.whole(out) as unfinished:
            if out.suffix == ".npz":
                np.savez(unfinished, **{METADATA: np.array(metadata)}, **arrays)  # type: ignore[arg-type]
            else:
                safetensors.numpy.save_file(arrays, unfinished, {METADATA: metadata})
    except safetensors.SafetensorError as error:
        raise UserError(f"--out={out}: cannot be written: {error}") from error
