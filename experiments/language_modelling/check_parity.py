"""Compares the Transformer-XL with values of its authors' PyTorch model in a golden file.

    python -m experiments.language_modelling.check_parity FILE.npz

It prints the largest differences as one line of JSON. The exit status is 0 if all of them are
within bounds, 1 if they are not, and 2, with one line, if the file is not a golden file.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.config import command_line
from experiments.errors import UserError
from experiments.language_modelling.models.reference_weights import (
    from_reference,
    settings_from_reference,
    to_reference,
)
from experiments.language_modelling.models.settings import Lengths
from experiments.language_modelling.models.transformer_xl import LanguageModel, Memory, Params

BOUNDS = {"nll": 2e-5, "memory": 2e-5, "gradient": 1e-4}
# The scale of a gradient whose largest entry is smaller.
SMALLEST_GRADIENT = 1e-9

Golden = Mapping[str, np.ndarray]


def read_golden(file: str | Path) -> dict[str, np.ndarray]:
    """Reads every array of a golden file.

    Raises:
      UserError: the file is missing, damaged, or without the keys of a golden file.
    """
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
            golden = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError("no such file") from None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"not a whole .npz file ({error})") from None
    missing = [key for key in ("cfg", "tokens", "nll/0") if key not in golden]
    for prefix in ("param/", "grad/"):
        if not any(name.startswith(prefix) for name in golden):
            missing.append(prefix + "NAME")
    if missing:
        raise UserError(f"not a golden file, it has no {', '.join(missing)}")
    return golden


def differences(golden: Golden) -> dict[str, float]:
    """Runs all segments of a golden file, and compares them with `compare`.

    Raises:
      UserError: settings, tokens, weights or expected values do not fit each other.
    """
    with jax.default_matmul_precision("highest"):
        return compare(Replay.of(golden), golden)


def compare(replay: Replay, golden: Golden) -> dict[str, float]:
    """The largest differences of likelihoods, memories and gradients.

    Those of gradients are relative to the largest entry of each tensor; the others are absolute.

    Args:
      replay: a replay before its first segment; all of its segments run.
      golden: the expected values, as from `read_golden`.
    """
    worst = {"nll": 0.0, "memory": 0.0}
    for s in range(len(replay.tokens_SxBxT)):
        nll_BxT, memories = replay.segment(s)
        worst["nll"] = _max(worst["nll"], _difference(golden, f"nll/{s}", nll_BxT.T))
        for i, memory_MxBxD in enumerate(memories):
            difference = _difference(golden, f"mem/{s}/{i}", memory_MxBxD)
            worst["memory"] = _max(worst["memory"], difference)
    gradients = to_reference(replay.gradients, replay.model.config, all_names=True)
    return worst | {"gradient": _gradient_difference(golden, gradients)}


class Replay:
    """Runs the segments of one golden file, one after another.

    Attributes:
      gradients: the gradients of the mean likelihood of the last segment that ran.
    """

    def __init__(
        self,
        model: LanguageModel,
        lengths: Lengths,
        params: Params,
        tokens_SxBxT: np.ndarray,
        targets_SxBxT: np.ndarray,
    ):
        self.model, self.lengths, self.params = model, lengths, params
        self.tokens_SxBxT, self.targets_SxBxT = tokens_SxBxT, targets_SxBxT
        self.memory = model.init_memory(tokens_SxBxT.shape[1], lengths)
        self.gradients: Params = params
        self.outputs_BxKxD = np.zeros((tokens_SxBxT.shape[1], 0, model.config.d_model), np.float32)
        self._step = jax.jit(jax.value_and_grad(self._apply, has_aux=True))

    @classmethod
    def of(cls, golden: Golden, *, scan: bool = False) -> Replay:
        """A replay before the first segment of a golden file."""
        config, lengths = settings_from_reference(_cfg(golden))
        config = dataclasses.replace(config, scan=scan)
        tokens_SxBxT, targets_SxBxT = _segments(golden, lengths, config.n_token)
        weights = {name: value for name, value in golden.items() if name.startswith("param/")}
        params = jax.tree.map(jnp.asarray, from_reference(weights, config))
        return cls(LanguageModel(config), lengths, params, tokens_SxBxT, targets_SxBxT)

    def _apply(
        self, params: Params, memory: Memory, tokens_BxT: jax.Array, targets_BxT: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Memory]]:
        hidden_BxTxD, memory = self.model.hidden(params, memory, tokens_BxT, self.lengths)
        nll_BxT = self.model.nll(params, hidden_BxTxD, targets_BxT)
        return nll_BxT.mean(), (nll_BxT, hidden_BxTxD, memory)

    def segment(self, s: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Runs segment s.

        The memories are those of the reference, which also remembers the output of the last layer.
        Nothing reads that output, and the model does not keep it, so it is gathered here.

        Returns:
          The likelihoods [B, T], and the memories [M, B, D].
        """
        (_, (nll_BxT, hidden_BxTxD, self.memory)), self.gradients = self._step(
            self.params, self.memory, self.tokens_SxBxT[s], self.targets_SxBxT[s]
        )
        m = self.lengths.memory
        self.outputs_BxKxD = np.concatenate([self.outputs_BxKxD, hidden_BxTxD], axis=1)
        if m == 0:
            return np.asarray(nll_BxT), []
        states = np.asarray(self.memory.states)[:, :, m - int(self.memory.valid) :]
        memories = [*states, self.outputs_BxKxD[:, -m:]]
        return np.asarray(nll_BxT), [memory.swapaxes(0, 1) for memory in memories]


def _cfg(golden: Golden) -> dict[str, Any]:
    try:
        return dict(json.loads(str(golden["cfg"])))
    except (ValueError, TypeError) as error:
        raise UserError(f"cfg is no JSON object: {error}") from None


def _segments(golden: Golden, lengths: Lengths, n_token: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, each [segments, B, T]."""
    tokens_NxB, t = golden["tokens"], lengths.target
    n = sum(name.startswith("nll/") for name in golden)
    fits = tokens_NxB.ndim == 2 and tokens_NxB.size and tokens_NxB.shape[0] == n * t + 1
    if not fits or tokens_NxB.dtype.kind not in "iu":
        raise UserError(
            f"tokens is {tokens_NxB.dtype} of shape {tokens_NxB.shape}: {n} segments of {t} need "
            f"whole numbers [{n * t + 1}, batch]"
        )
    if tokens_NxB.min() < 0 or tokens_NxB.max() >= n_token:
        raise UserError(f"tokens has a number outside 0 … {n_token - 1}")
    tokens_BxN = tokens_NxB.T.astype(np.int32)
    cut = [tokens_BxN[:, :-1], tokens_BxN[:, 1:]]
    tokens, targets = (np.stack(np.split(x, n, axis=1)) for x in cut)
    return tokens, targets


def _difference(golden: Golden, name: str, found: np.ndarray) -> float:
    if name not in golden:
        raise UserError(f"not a golden file, it has no {name}")
    if golden[name].shape != found.shape:
        raise UserError(f"{name} has shape {golden[name].shape}: the settings give {found.shape}")
    if golden[name].dtype.kind != "f":
        raise UserError(f"{name} is {golden[name].dtype}: must be floating numbers")
    return float(np.abs(golden[name] - found).max(initial=0.0))


def _gradient_difference(golden: Golden, gradients: Mapping[str, np.ndarray]) -> float:
    expected = {name for name in golden if name.startswith("grad/")}
    worst = 0.0
    for name in expected:
        if name.removeprefix("grad/") not in gradients:
            raise UserError(f"{name} is no weight of a model with these settings")
        difference = _difference(golden, name, gradients[name.removeprefix("grad/")])
        scale = max(float(np.abs(golden[name]).max(initial=0.0)), SMALLEST_GRADIENT)
        worst = _max(worst, difference / scale)
    return worst


def _max(a: float, b: float) -> float:
    """The larger of two numbers, or NaN if one of them is NaN."""
    return float(np.maximum(a, b))


@command_line.command
def main(argv: list[str]) -> int:
    """Checks one file; the exit status is 0 only if all differences are within the bounds."""
    parser = command_line.Parser(
        prog="experiments.language_modelling.check_parity", description=__doc__
    )
    parser.add_argument("file", metavar="FILE.npz")
    args = parser.parse_args(argv)
    try:
        found = differences(read_golden(args.file))
    except UserError as error:
        raise UserError(f"{args.file}: {error}") from error
    print(json.dumps(found))
    return 0 if all(found[kind] <= bound for kind, bound in BOUNDS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
