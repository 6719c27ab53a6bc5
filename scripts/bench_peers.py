"""Times our steps against those of other libraries, in turn on the same CPU.

    .venv/bin/python scripts/bench_peers.py [--rows=transformer_xl,resnet,updates,sparse]
        [--transformer_xl=DIR] [--repeats=9]

transformer_xl  the dense training step of configs/enwik8_small.py against that of its authors'
                PyTorch model with the same weights; DIR is a checkout of kimiyoung/transformer-xl
resnet          the dense training step of configs/imagenet_resnet50.py, on 8 images of 224 and in
                float32, against torchvision's ResNet-50 in its faster memory format
updates         masked Top-KAST at 90/80 around Adam against jaxpruner's magnitude pruning, both
                with a choice of masks every 100 steps, and against its straight-through estimator,
                both with a choice in every step; the parameters are those of the first row in
                separate layers, and the loss is half the squared norm of the forward view
sparse          scripts/bench_always_sparse.py with blocks of 128 and single entries, against
                SparseLab

A peer that is not installed is named under "not_installed", with what installs it. Both sides
compute in float32 with all cores that this process may use, and run in turn. A `ratio` is the
median over repeats of the time of ours over that of the peer in the same repeat: at 1.0 or below,
ours is as fast or faster. `quartiles` are those of the same ratios. PyTorch runs eagerly, without
torch.compile, with its fused optimizers. In the first two rows, each side has a process of its own,
and the others run in one. All of them keep the memory that they free, as experiments.main does. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

import topkast_jax as tk
from experiments.benchmarks.model_step import random_batch
from experiments.benchmarks.own_process import own_process
from experiments.config import command_line, resolve
from experiments.errors import UserError
from experiments.language_modelling.models.narrow import transformer_config
from experiments.language_modelling.models.reference_weights import to_reference
from experiments.processor import instruction_set
from experiments.task import make_task
from experiments.training.metric_sums import LOSS
from experiments.training.partition import all_devices
from experiments.training.program import Program, build
from scripts import bench_always_sparse
from scripts.bench_always_sparse import (
    Step,
    median_ratio,
    seconds_in_turn,
    use_all_cores,
)
from scripts.bench_step import with_choice
from topkast_jax import host_memory
from topkast_jax.always_sparse.host import cores
from topkast_jax.always_sparse.products import native_library

CONFIGS = Path(__file__).parents[1] / "configs"
TRANSFORMER_XL = f"{CONFIGS / 'enwik8_small.py'}:dense"
RESNET = f"{CONFIGS / 'imagenet_resnet50.py'}:dense"
RESNET_OVERRIDES = ("batch_size=8", "model.dtype=float32")
WARM = 3
SIZES_DIFFER = 0.01
LOSSES_DIFFER = 1e-3
FORWARD, BACKWARD, EVERY = 0.1, 0.2, 100


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two training steps that are compared.

    Attributes:
      step: does one step and returns its loss.
      parameters: the number of parameters.
    """

    step: Callable[[], float]
    parameters: int


def compare_processes(
    ours: Callable[[], Side], peer: Callable[[], Side], repeats: int
) -> dict[str, Any]:
    """Times two training steps in turn, each in a process of its own that makes its side.

    In one process, the temporaries of one library would lie between those of the other, and each
    step would ask the system for memory again.

    Raises:
      UserError: as in `compare`, or a process ended.
    """
    with _in_own_process(ours) as own, _in_own_process(peer) as other:
        record = compare(own.side, other.side, repeats)
        found = {"ours": own.threads()["xla"], "peer": other.threads()["torch"]}
    return record | {"threads": found}


@dataclasses.dataclass(frozen=True)
class _Remote:
    side: Side
    threads: Callable[[], dict[str, int | None]]


@contextlib.contextmanager
def _in_own_process(make: Callable[[], Side]) -> Iterator[_Remote]:
    with own_process("one side") as process:
        parameters = process.submit(_make, make).result()
        side = Side(lambda: process.submit(_step).result(), parameters)
        yield _Remote(side, lambda: process.submit(threads).result())


_SIDES: list[Side] = []  # Of a process that was made for one side.


def _make(make: Callable[[], Side]) -> int:
    host_memory.keep_freed()
    use_all_cores()
    _SIDES.append(make())
    return _SIDES[0].parameters


def _step() -> float:
    return _SIDES[0].step()


def compare(ours: Side, peer: Side, repeats: int) -> dict[str, Any]:
    """Times two training steps in turn.

    Raises:
      UserError: the sides differ in size, or a loss is not finite.
    """
    sides = {"ours": ours, "peer": peer}
    sizes = {name: side.parameters for name, side in sides.items()}
    if abs(sizes["ours"] - sizes["peer"]) > SIZES_DIFFER * sizes["peer"]:
        raise UserError(f"the two sides have {sizes} parameters; they must agree within 1 %")
    losses: dict[str, list[float]] = {name: [] for name in sides}

    def run(name: str) -> None:
        losses[name].append(sides[name].step())
        if not math.isfinite(losses[name][-1]):
            raise UserError(f"step {len(losses[name])} of {name}: the loss is {losses[name][-1]}")

    for _ in range(WARM):
        run("ours")
        run("peer")
    seconds = seconds_in_turn({"ours": lambda: run("ours"), "peer": lambda: run("peer")}, repeats)
    return {
        **ratios(seconds["ours"], seconds["peer"]),
        "parameters": sizes,
        "first_loss": {name: round(values[0], 5) for name, values in losses.items()},
    }


def ratios(ours: np.ndarray, peer: np.ndarray) -> dict[str, Any]:
    """The median ratio of the seconds of each repeat, its quartiles, and the median seconds."""
    return {
        "ratio": median_ratio(ours, peer),
        "quartiles": [round(float(q), 4) for q in np.quantile(ours / peer, (0.25, 0.75))],
        "ours_seconds": round(float(np.median(ours)), 5),
        "peer_seconds": round(float(np.median(peer)), 5),
    }


def our_step(program: Program, batch: Any) -> Side:
    """The training step of a run, on the same batch every time."""
    state = [program.representation.init()]

    def step() -> float:
        state[0], sums = program.step(state[0], batch)
        jax.block_until_ready(state[0])
        return float(sums[LOSS])

    return Side(step, sum(leaf.size for leaf in jax.tree.leaves(state[0].params)))


def transformer_xl(checkout: str, repeats: int) -> dict[str, Any]:
    """Our Transformer-XL against its authors', from the same weights on the same tokens."""
    peer = functools.partial(reference_transformer_xl, checkout)
    record = compare_processes(our_transformer_xl, peer, repeats)
    first = record["first_loss"]
    if not math.isclose(first["ours"], first["peer"], rel_tol=LOSSES_DIFFER):
        raise UserError(f"--transformer_xl={checkout}: the first losses are {first}; must agree")
    config = resolve(TRANSFORMER_XL, ())
    sizes = ("n_layer", "n_head", "d_model", "d_head", "d_inner", "dropout", "dropatt")
    return record | {
        "sizes": {name: config.model[name] for name in sizes}
        | {"batch": config.batch_size, **config.model.train.to_dict()},
    }


def our_transformer_xl() -> Side:
    """The training step of the config on random tokens."""
    program = build(resolve(TRANSFORMER_XL, ()))
    return our_step(program, random_batch(program))


def reference_transformer_xl(checkout: str) -> Side:
    """The authors' model with our weights, Adam and clipping by the global norm.

    Two things of the authors' code no longer work and are made up for here. Its softmax reads the
    version of CUDA when it is imported, of which a PyTorch for CPUs has none. Its masks of
    attention are bytes, where PyTorch now asks for booleans.
    """
    import torch  # type: ignore[import-not-found, unused-ignore]

    folder = Path(checkout) / "pytorch"
    sys.path[:0] = [str(folder), str(folder / "utils")]
    with mock.patch.object(torch.version, "cuda", torch.version.cuda or "0.0"):
        module = importlib.import_module("mem_transformer")
    program = build(resolve(TRANSFORMER_XL, ()))
    batch = random_batch(program)
    config, train = program.config, program.config.model.train
    settings = transformer_config(config.model, config.data.vocabulary_size)
    names = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "dropout", "dropatt")
    model = module.MemTransformerLM(
        **{name: getattr(settings, name) for name in names}, tie_weight=settings.tie_weight,
        pre_lnorm=settings.pre_lnorm, tgt_len=train.target, mem_len=train.memory, ext_len=0,
        same_length=train.same_length, clamp_len=train.clamp,
    )  # fmt: skip
    params = program.representation.init().params
    weights = to_reference(params, settings, all_names=True)
    model.load_state_dict(
        {name: torch.tensor(value) for name, value in weights.items()}
        | {"pos_emb.inv_freq": model.pos_emb.inv_freq}
    )
    for layer in model.layers:
        layer.register_forward_pre_hook(_with_boolean_mask, with_kwargs=True)
    tokens, targets = (
        torch.tensor(np.asarray(batch[name]).T, dtype=torch.long).contiguous()
        for name in ("tokens", "targets")
    )
    c = config.optimizer
    adam = torch.optim.Adam(model.parameters(), c.learning_rate, (c.b1, c.b2), c.eps, fused=True)
    memory: list[Any] = [()]

    def step() -> float:
        adam.zero_grad()
        nll, *memory[0] = model(tokens, targets, *memory[0])
        loss = nll.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_global_norm)
        adam.step()
        return float(loss.detach())

    return Side(step, _torch_parameters(model))


def _with_boolean_mask(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"dec_attn_mask": kwargs["dec_attn_mask"].bool()}


def resnet(repeats: int) -> dict[str, Any]:
    """Our ResNet-50 against torchvision's, on random images and labels."""
    record = compare_processes(our_resnet50, torchvision_resnet50, repeats)
    return record | {"sizes": {"images": list(_images(resolve(RESNET, RESNET_OVERRIDES))[0].shape)}}


def our_resnet50() -> Side:
    """The training step of the config."""
    program = build(resolve(RESNET, RESNET_OVERRIDES))
    images, labels = _images(program.config)
    return our_step(program, program.put({"image": images, "label": labels}))


def _images(config: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """A batch of random images and their labels."""
    rng = np.random.default_rng(0)
    shape = make_task(config).example_batch()["image"].shape
    images = rng.integers(0, 256, shape).astype(np.uint8)
    return images, rng.integers(0, 1000, shape[0]).astype(np.int32)


def torchvision_resnet50() -> Side:
    """Torchvision's ResNet-50 with momentum, on images that are normalised beforehand."""
    import torch
    import torchvision  # type: ignore[import-not-found, unused-ignore]

    config = resolve(RESNET, RESNET_OVERRIDES)
    images, labels = _images(config)
    model = torchvision.models.resnet50(zero_init_residual=True)
    model = model.to(memory_format=torch.channels_last)
    pixels = torch.tensor((images.transpose(0, 3, 1, 2) / 255 - 0.45) / 0.225, dtype=torch.float32)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    targets = torch.tensor(labels, dtype=torch.long)
    cross_entropy = torch.nn.CrossEntropyLoss(label_smoothing=config.model.label_smoothing)
    c = config.optimizer
    sgd = torch.optim.SGD(
        model.parameters(), config.derived.learning_rate, c.momentum,
        weight_decay=c.l2, nesterov=c.nesterov, fused=True,
    )  # fmt: skip

    def step() -> float:
        sgd.zero_grad()
        loss = cross_entropy(model(pixels), targets)
        loss.backward()
        sgd.step()
        return float(loss.detach())

    return Side(step, _torch_parameters(model))


def _torch_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Masked:
    """A training step under masks, where the model costs nothing: the loss is ½‖view‖².

    Args:
      params: the parameters before the first step.
      tx: the optimizer, with masks in its state.
      view: (params, state) → the parameters that a model would run on.
      after: (params, state) → the parameters after an update.
    """

    def __init__(
        self,
        params: Any,
        tx: optax.GradientTransformation,
        view: Callable[[Any, Any], Any],
        after: Callable[[Any, Any], Any] = lambda params, state: params,
    ):
        def step(params: Any, state: Any) -> tuple[Any, Any, jax.Array]:
            loss, grads = jax.value_and_grad(_half_square)(view(params, state))
            updates, state = tx.update(grads, state, params)
            return after(optax.apply_updates(params, updates), state), state, loss

        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._params = jax.tree.map(jnp.copy, params)
        self._state = jax.jit(tx.init)(params)

    def step(self, prepare: Callable[[Any], Any]) -> None:
        """Does one step from a state that is prepared for it, for example so that masks are due."""
        self._params, self._state, loss = self._step(self._params, prepare(self._state))
        jax.block_until_ready(self._params)
        if not math.isfinite(loss):
            raise UserError(f"updates: the loss is {loss}")


def _half_square(view: Any) -> jax.Array:
    return 0.5 * optax.tree.norm(view, squared=True)


def masked_top_kast(params: Any, refresh_every: int) -> Masked:
    """Top-KAST around Adam; kernels are sparse."""
    rules: list[tuple[str, tk.Dense | tk.Sparse]] = [
        (".*/kernel", tk.Sparse()),
        (".*", tk.Dense()),
    ]
    adam = optax.adam(1e-3)
    tx = tk.top_kast(adam, FORWARD, BACKWARD, refresh_every=refresh_every, rules=rules)
    return Masked(params, tx, tk.forward_params)


def jaxpruner_updater(params: Any, name: str) -> Masked:
    """One of jaxpruner's algorithms around Adam, with the same kernels as sparse and as often.

    It calls `jax.tree_map`, which JAX has removed.
    """
    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree.map  # type: ignore[attr-defined, unused-ignore]
    import jaxpruner  # type: ignore[import-not-found, unused-ignore]
    from jaxpruner import (  # type: ignore[import-not-found, unused-ignore]
        sparsity_distributions,
    )

    distribution = sparsity_distributions.uniform
    kernels = sparsity_distributions.KERNEL_FILTER_FN
    updater = jaxpruner.ALGORITHM_REGISTRY[name](
        scheduler=jaxpruner.PeriodicSchedule(EVERY, 0, None),
        sparsity_distribution_fn=lambda tree: distribution(tree, 1 - FORWARD, filter_fn=kernels),
    )
    tx = updater.wrap_optax(optax.adam(1e-3))
    return Masked(params, tx, updater.pre_forward_update, updater.post_gradient_update)


def updates(repeats: int) -> dict[str, Any]:
    """Masked Top-KAST against two algorithms of jaxpruner."""
    task = make_task(resolve(TRANSFORMER_XL, ["model.scan=False"]))
    params, _ = jax.jit(task.init)(jax.random.key(0))
    seldom, often = masked_top_kast(params, EVERY), masked_top_kast(params, 1)
    magnitude = jaxpruner_updater(params, "magnitude")
    straight_through = jaxpruner_updater(params, "magnitude_ste")
    steps: dict[str, Step] = {
        "plain": lambda: seldom.step(lambda state: with_choice(state, False)),
        "peer plain": lambda: magnitude.step(lambda state: _at_count(state, EVERY + 1)),
        "refresh": lambda: seldom.step(lambda state: with_choice(state, True)),
        "peer refresh": lambda: magnitude.step(lambda state: _at_count(state, EVERY)),
        "often": lambda: often.step(lambda state: with_choice(state, True)),
        "peer often": lambda: straight_through.step(lambda state: _at_count(state, EVERY)),
    }
    taken = seconds_in_turn(steps, repeats)
    own, peer = (
        ((EVERY - 1) * taken[f"{side}plain"] + taken[f"{side}refresh"]) / EVERY
        for side in ("", "peer ")
    )
    return {
        "magnitude": {
            "amortised": ratios(own, peer),
            "without_a_choice": ratios(taken["plain"], taken["peer plain"]),
            "with_a_choice": ratios(taken["refresh"], taken["peer refresh"]),
        },
        "magnitude_ste": ratios(taken["often"], taken["peer often"]),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "refresh_every": {"magnitude": EVERY, "magnitude_ste": 1},
    }


def _at_count(state: Any, count: int) -> Any:
    """The state of jaxpruner before an update of that number, from 0; it chooses at multiples."""
    return state._replace(count=jnp.int32(count))


def sparse(repeats: int) -> dict[str, Any]:
    """Our always-sparse steps against those of SparseLab."""
    densities = list(bench_always_sparse.DENSITIES)
    return bench_always_sparse.bench(["block128", "unstructured"], densities, repeats)


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison.

    Attributes:
      measure: makes its record, from the flags.
      packages: what it imports of the peer.
      install: how to install the peer.
      flag: the flag without which there is no peer, if it is no package.
    """

    measure: Callable[[argparse.Namespace], dict[str, Any]]
    packages: tuple[str, ...]
    install: str
    flag: str | None = None

    def installed(self, args: argparse.Namespace) -> bool:
        """Whether Python finds the packages, and the flag is given."""
        packages = all(importlib.util.find_spec(package) for package in self.packages)
        return packages and (self.flag is None or getattr(args, self.flag) is not None)


ROWS = {
    "transformer_xl": Row(
        lambda args: transformer_xl(args.transformer_xl, args.repeats),
        ("torch",),
        "pip install torch; git clone https://github.com/kimiyoung/transformer-xl DIR; "
        "--transformer_xl=DIR",
        flag="transformer_xl",
    ),
    "resnet": Row(
        lambda args: resnet(args.repeats), ("torch", "torchvision"), "pip install torch torchvision"
    ),
    "updates": Row(
        lambda args: updates(args.repeats),
        ("jaxpruner", "chex"),
        "pip install chex; pip install --no-deps git+https://github.com/google-research/jaxpruner",
    ),
    "sparse": Row(
        lambda args: sparse(args.repeats), ("torch", "sparselab"), "pip install torch sparselab"
    ),
}


def machine() -> dict[str, Any]:
    """The CPU, the threads of this process after its rows, and the versions that are installed."""
    return {
        "device": jax.devices()[0].device_kind,
        "instruction_set": instruction_set(),
        "native_cpu": native_library.unavailable() or "used",
        "cores": cores(),
        "threads": threads(),
        "versions": _versions("jax", "torch", "torchvision", "jaxpruner", "sparselab"),
    }


def threads() -> dict[str, int | None]:
    """The threads of each library in this process; those of XLA as Linux lists them by name."""
    names = []
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # A thread may have ended since.
            names.append((task / "comm").read_text())
    found = {"xla": sum(name.startswith("tf_XLAEigen") for name in names) or None, "torch": None}
    if torch := sys.modules.get("torch"):
        found["torch"] = torch.get_num_threads()
    return found


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _checkout(text: str) -> str:
    file = Path(command_line.path(text)) / "pytorch/mem_transformer.py"
    if not file.is_file():
        raise argparse.ArgumentTypeError(
            f"found {text!r}; must be a checkout of transformer-xl, with {file.name} in pytorch/"
        )
    return text


@command_line.command
def main(argv: list[str]) -> None:
    """Measures the rows whose peers are installed; prints each, and all of them as JSON."""
    parser = command_line.Parser(prog="scripts/bench_peers.py", description=__doc__)
    parser.add_argument("--rows", type=command_line.some_of(ROWS), default=",".join(ROWS))
    parser.add_argument("--transformer_xl", type=_checkout, metavar="DIR", help="see above")
    parser.add_argument("--repeats", type=command_line.positive, default=9)
    args = parser.parse_args(argv)
    if args.transformer_xl and "transformer_xl" not in args.rows:
        raise UserError("--transformer_xl is read only for the row transformer_xl")
    if all_devices()[0].platform != "cpu":
        raise UserError("the peers run on the CPU: set JAX_PLATFORMS=cpu")
    chosen = {name: ROWS[name] for name in args.rows}
    here = {name: row for name, row in chosen.items() if row.installed(args)}
    missing = {name: row.install for name, row in chosen.items() if name not in here}
    if not here:
        told = "; ".join(f"{name}: {install}" for name, install in missing.items())
        raise UserError(f"--rows={','.join(chosen)}: no peer is installed ({told})")
    host_memory.keep_freed()
    use_all_cores()
    rows = {}
    for name, row in here.items():
        rows[name] = row.measure(args)
        print(f"{name}: {rows[name]}", flush=True)
    print(json.dumps({"rows": rows, "not_installed": missing, **machine()}))


if __name__ == "__main__":
    sys.exit(main())
