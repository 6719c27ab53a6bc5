"""The defaults of a config, and the variants that choose its method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

import topkast_jax as tk
from experiments import task as tasks
from experiments.errors import VariantError
from experiments.training import methods


def base_config(task: str) -> ConfigDict:
    """The default config of a task. A config file changes its values; it cannot add keys.

    Its section `method` takes the arguments of the method that it names, in any file
    (`package.module:factory`) or registered.

    Args:
        task: the name of a registered task, which provides the sections `model` and `data`.
    """
    own = tasks.task_module(task).default_config()
    config = ConfigDict(
        {
            "name": "",  # Of the file and its variant.
            "command": (),  # The arguments that made the config, the seed's apart.
            "task": task,
            "seed": 0,
            "steps": 1000,
            "batch_size": 128,
            "log_every": 100,
            "eval_every": 0,  # 0 evaluates only at the end.
            "eval_at_end": True,
            "checkpoint_every": 0,  # 0 saves only at the end.
            "keep_checkpoints": 2,  # The last ones.
            "keep_checkpoints_every": 0,  # Also those of all multiples of so many steps.
            # Also the best one, by a metric of the evaluations: "max accuracy", "min loss".
            "keep_best_checkpoint": "",
            "write_sets_every": 0,  # 0 never writes them; see `experiments.records.set_files`.
            "model": own.model,
            "data": own.data,
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.1,
                # The batch size that learning_rate is for; 0 does not scale it.
                "reference_batch_size": 0,
                "momentum": 0.9,
                "nesterov": False,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                # Added to the gradient; only on dense leaves if the method has its own penalty.
                "l2": 0.0,
                "weight_decay": 0.0,  # Decoupled from the gradient.
                "clip_global_norm": 0.0,  # 0 does not clip.
                "schedule": {
                    "name": "constant",
                    "warmup_steps": 0,
                    "boundaries": (),
                    "factor": 0.1,
                    "final_factor": 0.0,
                    # The steps that warm-up and boundaries are for; 0 does not scale them.
                    "reference_steps": 0,
                },
            },
            "method": methods.MethodSection({"name": "dense"}),
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
    return config.lock()


def check_variant(variant: str, allowed: Iterable[str]) -> None:
    """Checks the variant of a sweep file; the empty one stands for a file named without any.

    Raises:
        UserError: it is not one of those that are allowed.
    """
    names = list(allowed)
    if variant not in names:
        listed = ", ".join(name or "nothing" for name in names)
        raise VariantError(f"variant {variant!r}: allowed: {listed}")


def apply_variant(
    config: ConfigDict, variant: str, flags: Sequence[str | tuple[str, ...]] = ("smoke",)
) -> set[str]:
    """Sets the method of a config from a variant.

    Args:
        config: the config; it is changed in place.
        variant: a comma list of words: `dense`, `F/B` (Top-KAST with forward and backward sparsity
            in percent), `METHOD-F` (another registered method with forward sparsity F), `static-F`
            (a fixed random mask, `static_random-F`), `small-dense-F` (a dense and narrower model
            of the same depth, with as many parameters as one of F % sparsity by `method.rules` runs
            on), and the flags.
        flags: further words, to which the config file itself reacts. Of those in one tuple, a
            variant contains one at most.

    Returns:
        The flags that the variant contains.

    Raises:
        UserError: a word is not known, or two words contradict each other.
    """
    groups = [(flag,) if isinstance(flag, str) else flag for flag in flags]
    words = [word for group in groups for word in group]
    found, named = set(), ""
    for word in filter(None, (word.strip() for word in variant.split(","))):
        if word in words:
            found.add(word)
            continue
        _apply_method(config, word, words)
        if named:
            raise VariantError(f"variant {variant!r}: {named!r} and {word!r} both name a method")
        named = word
    for both in ([word for word in group if word in found] for group in groups):
        if len(both) > 1:
            raise VariantError(
                f"variant {variant!r}: {both[0]!r} and {both[1]!r} exclude each other"
            )
    return found


def _apply_method(config: ConfigDict, word: str, flags: Sequence[str]) -> None:
    method = config.method
    try:
        if word == "dense":
            method.name = "dense"
        elif word.startswith("small-dense-") and "small_dense" in config.model:
            small = config.model.small_dense
            small.forward_density = _density(word.removeprefix("small-dense-"))
            small.rules = method.get("rules", ())
            method.name = "dense"
        elif "-" in word:
            name, _, forward = word.rpartition("-")
            method.name = {"static": "static_random"}.get(name, name)
            if method.name not in tk.methods.names() or method.name == "top_kast":
                raise ValueError
            method.forward_density = _density(forward)
        else:
            forward, backward = word.split("/")
            method.name = "top_kast"
            method.forward_density = _density(forward)
            method.backward_density = _density(backward)
    except ValueError:
        names = [f"{name}-F" for name in tk.methods.names() if name != "top_kast"]
        small = ["small-dense-F"] if "small_dense" in config.model else []
        allowed = ", ".join(["dense", "F/B", "static-F", *small, *names, *flags])
        raise VariantError(
            f"variant {word!r}: allowed: {allowed} (F, B: sparsity in %, 0 to below 100)"
        ) from None


def _density(percent: str) -> float:
    density = round(1 - float(percent) / 100, 9) if percent.isascii() else 0.0
    if not 0 < density <= 1:
        raise ValueError
    return density
