"""Converts weights with the names of the authors' PyTorch model to parameters, and back.

`from_reference` needs only a state dict that is saved as `.npz`
(`numpy.savez(file, **{k: v.numpy() for k, v in model.state_dict()…})`). The published layout is
that of `MemTransformerLM`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from experiments.errors import UserError
from experiments.language_modelling.models.settings import Lengths, TransformerXLConfig
from experiments.language_modelling.models.transformer_xl import LanguageModel, Params

# Parameters by "/"-joined path, with separate layers.
Flat = dict[str, np.ndarray]

_PREFIX = re.compile(r"^(param/|module\.|model\.|transformer\.)+")
_SAME_NAME = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "d_embed", "div_val",
              "tie_weight", "pre_lnorm", "dropout", "dropatt")  # fmt: skip
# Settings of the reference that have only one supported value.
_ONLY: dict[str, tuple[Any, ...]] = {"attn_type": (0,), "ext_len": (0,), "sample_softmax": (-1, 0)}


def settings_from_reference(cfg: Mapping[str, Any]) -> tuple[TransformerXLConfig, Lengths]:
    """The settings from the constructor arguments of the reference.

    Raises:
      UserError: an argument is missing or is not supported.
    """
    for name, only in _ONLY.items():
        if cfg.get(name, only[0]) not in only:
            raise UserError(f"{name}={cfg[name]!r}: only {name}={only[0]} is supported")
    try:
        config = TransformerXLConfig(
            **{name: cfg[name] for name in _SAME_NAME},
            cutoffs=tuple(cfg["cutoffs"] or ()),
            tie_projs=_tie_projs(cfg),
            untie_r=bool(cfg.get("untie_r", False)),
        )
        lengths = Lengths(
            target=cfg["tgt_len"], memory=cfg["mem_len"], clamp=cfg["clamp_len"],
            same_length=bool(cfg["same_length"]),
        )  # fmt: skip
    except KeyError as error:
        raise UserError(f"cfg has no {error.args[0]!r}") from None
    except TypeError as error:
        raise UserError(f"cfg holds a value of the wrong kind: {error}") from None
    return config, lengths


def _tie_projs(cfg: Mapping[str, Any]) -> tuple[bool, ...]:
    tied = [bool(tied) for tied in cfg["tie_projs"] or ()]
    clusters = len(cfg["cutoffs"] or ()) + 1
    while len(tied) > clusters and not tied[-1]:
        tied.pop()
    return tuple(tied)


def from_reference(weights: Mapping[str, np.ndarray], config: TransformerXLConfig) -> Params:
    """The parameters from the weights of the reference.

    Args:
      weights: the weights by the names of the reference, with or without a prefix such as `param/`
        or `module.`; tied weights may have one of their names or all of them.
      config: the settings with which the weights were made.

    Returns:
      As from `LanguageModel(config).init`.

    Raises:
      UserError: names the first weight that is missing, unexpected, of another shape, or that
        differs from the one it is tied to.
    """
    given = {_PREFIX.sub("", name): _real(name, value) for name, value in weights.items()}
    given = _split_stacked_biases(given, config)
    flat: Flat = {}
    for name, paths in _names(config).items():
        value = _pick(given, name)
        for path, part in zip(paths, _parts(name, value, len(paths)), strict=True):
            flat[path] = part
    if given:
        raise UserError(f"weight {min(given)!r} has no place in a model of these settings")
    return _checked(_stack_layers(flat, config), LanguageModel(config).abstract_params)


def to_reference(
    params: Params, config: TransformerXLConfig, *, all_names: bool = False
) -> dict[str, np.ndarray]:
    """Parameters, or gradients of the same structure, by the names of the reference.

    Args:
      params: as from `LanguageModel(config).init`.
      config: their settings.
      all_names: tied ones under each of their names in place of the first alone.
    """
    flat = _unstack_layers(_flatten(params), config)
    weights: dict[str, np.ndarray] = {}
    for name, paths in _names(config).items():
        parts = [_oriented(name, flat[path], config) for path in paths]
        names = name.split("|")
        weights |= dict.fromkeys(names if all_names else names[:1], np.concatenate(parts))
    return weights


def _names(config: TransformerXLConfig) -> dict[str, tuple[str, ...]]:
    """The path of each weight in the parameters, by its name or its "|"-joined tied names."""
    names = dict(_embedding_names(config))
    for i in range(config.n_layer):
        names |= _layer_names(i, config.untie_r)
    if not config.untie_r:
        names |= {"r_w_bias": ("attention_bias/content",)}
        names |= {"r_r_bias": ("attention_bias/position",)}
    return names | dict(_softmax_names(config))


def _layer_names(i: int, untie_r: bool) -> dict[str, tuple[str, ...]]:
    attention, block, path = f"layers.{i}.dec_attn", f"layers.{i}.pos_ff", f"layers/{i}"
    qkv = tuple(f"{path}/attention/{part}/kernel" for part in ("query", "key", "value"))
    names = {
        f"{attention}.qkv_net.weight": qkv,
        f"{attention}.o_net.weight": (f"{path}/attention/output/kernel",),
        f"{attention}.r_net.weight": (f"{path}/attention/position/kernel",),
        f"{attention}.layer_norm.weight": (f"{path}/attention_norm/scale",),
        f"{attention}.layer_norm.bias": (f"{path}/attention_norm/bias",),
        f"{block}.CoreNet.0.weight": (f"{path}/feed_forward/up/kernel",),
        f"{block}.CoreNet.0.bias": (f"{path}/feed_forward/up/bias",),
        f"{block}.CoreNet.3.weight": (f"{path}/feed_forward/down/kernel",),
        f"{block}.CoreNet.3.bias": (f"{path}/feed_forward/down/bias",),
        f"{block}.layer_norm.weight": (f"{path}/feed_forward_norm/scale",),
        f"{block}.layer_norm.bias": (f"{path}/feed_forward_norm/bias",),
    }
    if untie_r:
        names |= {f"{attention}.r_w_bias": (f"{path}/attention/bias/content",)}
        names |= {f"{attention}.r_r_bias": (f"{path}/attention/bias/position",)}
    return names


def _embedding_names(config: TransformerXLConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    for i in range(len(config.table_shapes)):
        tied = f"|crit.out_layers.{i}.weight" if config.tie_weight else ""
        yield f"word_emb.emb_layers.{i}.weight{tied}", (f"embedding/table/{i}",)
        if config.projected:
            clusters = range(config.n_cluster) if config.div_val == 1 else (i,)
            tied = "".join(f"|crit.out_projs.{c}" for c in clusters if config.tied_projection(c))
            yield f"word_emb.emb_projs.{i}{tied}", (f"embedding/projection/{i}",)


def _softmax_names(config: TransformerXLConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    if config.cutoffs:
        yield "crit.cluster_weight", ("softmax/cluster/table",)
        yield "crit.cluster_bias", ("softmax/cluster/bias",)
    for i in range(len(config.table_shapes)):
        yield f"crit.out_layers.{i}.bias", (f"softmax/bias/{i}",)
        if not config.tie_weight:
            yield f"crit.out_layers.{i}.weight", (f"softmax/table/{i}",)
    for i in range(config.n_cluster if config.projected else 0):
        if not config.tied_projection(i):
            yield f"crit.out_projs.{i}", (f"softmax/projection/{i}",)


def _real(name: str, value: np.ndarray) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.kind not in "fiu" or value.ndim == 0:
        raise UserError(
            f"weight {name!r} is {value.dtype} of shape {value.shape}: must be an array of numbers"
        )
    return value


def _pick(given: Flat, names: str) -> np.ndarray:
    """Removes a weight from `given`, with all the names to which it is tied."""
    found = {name: given.pop(name) for name in names.split("|") if name in given}
    if not found:
        raise UserError(f"weight {names.replace('|', ' or ')!r} is missing")
    (first, value), *others = found.items()
    for name, other in others:
        if not np.array_equal(value, other):
            raise UserError(f"weights {first!r} and {name!r} differ: the settings tie them")
    return value


def _transposed(name: str) -> bool:
    """Transposes kernels and projections, which are [out, in] in the reference."""
    return bool(re.search(r"(_net|CoreNet\.\d)\.weight$|_projs\.\d+(\||$)", name))


def _parts(name: str, value: np.ndarray, n: int) -> list[np.ndarray]:
    if re.search(r"r_[wr]_bias$", name):
        return [value.reshape(-1)]
    if value.shape[0] % n:
        raise UserError(f"weight {name!r} has shape {value.shape}: cannot be cut in {n}")
    parts = np.split(value, n)
    return [part.T for part in parts] if _transposed(name) else parts


def _oriented(name: str, value: np.ndarray, config: TransformerXLConfig) -> np.ndarray:
    if re.search(r"r_[wr]_bias$", name):
        return value.reshape(config.n_head, config.d_head)
    return value.T if _transposed(name) else value


def _split_stacked_biases(given: Flat, config: TransformerXLConfig) -> Flat:
    """Drops the buffer of frequencies, and divides untied biases that are in one array by layer."""
    given.pop("pos_emb.inv_freq", None)
    for name in ("r_w_bias", "r_r_bias"):
        if config.untie_r and len(stacked := given.get(name, np.empty(0))) == config.n_layer:
            del given[name]
            given |= {f"layers.{i}.dec_attn.{name}": part for i, part in enumerate(stacked)}
    return given


def _stack_layers(flat: Flat, config: TransformerXLConfig) -> Flat:
    """Stacks layers/0/x, layers/1/x, … as layers/x, if the settings ask for it."""
    if not config.scan:
        return flat
    stacked = {path: value for path, value in flat.items() if not path.startswith("layers/")}
    for path in [p.removeprefix("layers/0/") for p in flat if p.startswith("layers/0/")]:
        values = [flat[f"layers/{i}/{path}"] for i in range(config.n_layer)]
        if len({value.shape for value in values}) > 1:
            raise UserError(f"weights of layers/*/{path} differ in shape from layer to layer")
        stacked[f"layers/{path}"] = np.stack(values)
    return stacked


def _unstack_layers(flat: Flat, config: TransformerXLConfig) -> Flat:
    if not config.scan:
        return flat
    layers = {path: value for path, value in flat.items() if path.startswith("layers/")}
    rest = {path: value for path, value in flat.items() if path not in layers}
    return rest | {
        f"layers/{i}/{path.removeprefix('layers/')}": part
        for path, value in layers.items()
        for i, part in enumerate(value)
    }


def _flatten(params: Params) -> Flat:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(str(key.key) for key in path): np.asarray(leaf) for path, leaf in leaves}


def _checked(flat: Flat, abstract: Params) -> Params:
    """The nested parameters, after a check that all shapes are those of the model."""

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = "/".join(str(key.key) for key in path)
        if flat[name].shape != leaf.shape:
            raise UserError(
                f"weight for {name} has shape {flat[name].shape}: the settings ask for {leaf.shape}"
            )
        return np.ascontiguousarray(flat[name], dtype=np.float32)

    return jax.tree_util.tree_map_with_path(place, abstract)
