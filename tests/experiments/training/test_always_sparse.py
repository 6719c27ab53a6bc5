"""Experiments that are always sparse: the run of the masked ones, in a part of the memory."""

from pathlib import Path

import jax
import numpy as np
import pytest
import toy_runs
from oracle import buffer_sizes

import topkast_jax as tk
from experiments import main
from experiments.config import resolve
from experiments.errors import UserError
from experiments.training import representation
from experiments.training.program import build
from topkast_jax.always_sparse import products
from topkast_jax.sets import find_compact

ROOT = Path(__file__).parents[3]

SGD = ("optimizer.name=sgd", "optimizer.learning_rate=0.05")
ADAM = (  # Adam divides gradients of nearly nothing, all rounding error, by eps
    "optimizer.name=adam", "optimizer.learning_rate=0.001", "optimizer.eps=1e-5",
)  # fmt: skip
BLOCKS = ("method.pattern=block:8x8",)
RESNET20 = ("steps=200", "optimizer.schedule.name=constant", "optimizer.schedule.warmup_steps=0",
            "batch_size=16", "model.width=1.0")  # fmt: skip
SLOW = ("optimizer.learning_rate=0.01",)  # at the config's 0.1 rounding alone parts the two paths
CONVOLUTIONS = (  # block products sum in another order, which grows here; txl-block has them
    "method.pattern=block:4x4",
    """method.rules=((".*conv[12]/kernel", "sparse"), (".*", "dense"))""",
)  # fmt: skip
CASES = {
    "resnet20": ("cifar10_resnet20", (*RESNET20, *SLOW)),
    "resnet20-adam": ("cifar10_resnet20", (*RESNET20, *ADAM)),
    "resnet20-block": ("cifar10_resnet20", (*RESNET20, *SLOW, *CONVOLUTIONS)),
    "txl": ("enwik8_small", ("steps=200", *ADAM)),
    "txl-sgd": ("enwik8_small", ("steps=200", *SGD)),
    "txl-block": ("enwik8_small", ("steps=200", *ADAM, *BLOCKS)),
}


# Two sparse leaves compile in a third of the time of all.
FEW = {
    "enwik8_small": """method.rules=(("layers/feed.*/kernel", "sparse"), (".*", "dense"))""",
}


def configs(name, overrides, devices_mesh=()):
    spec = f"{ROOT / 'configs' / name}.py:90/80,smoke"
    common = (*overrides, "method.refresh_every=20", *devices_mesh)
    return [
        resolve(spec, (*common, *own))
        for own in (("method.inner_state=reset",), ("method.always_sparse=True",))
    ]


def steps(config, count, devices=None):
    """The run, its loss and its state after each step."""
    run = build(config, devices)
    state, data = run.representation.init(), run.task.train_data()
    for step in range(1, count + 1):
        batch = run.put(next(data))
        gradients = run.step.gradients(state, batch, step)
        state, sums = run.step(state, batch)
        state = run.representation.between_steps(state, step, gradients)
        other = yield run, float(sums["loss"][0] / sums["loss"][1]), state
        state = state if other is None else other  # what `send` gave


def dense_of(run, state):
    """Dense parameters and masked optimizer state of either form."""
    if state.reservoir == ():
        return state.params, state.opt_state
    return run.representation.sparse.to_masked(state.params, state.opt_state, state.reservoir)


def assert_same_run(masked, compact, count):
    """Compares parameters after 20 steps each, and the sets chosen then; returns how often."""
    one_run, other_run = steps(masked, count), steps(compact, count)
    for i in range(1, count + 1):
        (run, loss, state), (held, other_loss, other) = next(one_run), next(other_run)
        assert other_loss == pytest.approx(loss, rel=1e-3)
        if i % 20 == 0:
            one, two = dense_of(run, state), dense_of(held, other)
            for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(two[0]), strict=True):
                assert norm(a, b) <= 1e-5 * norm(a), f"after step {i}"
            jax.tree.map(np.testing.assert_array_equal, tk.keep_masks(*one), tk.keep_masks(*two))
    return count // 20


def norm(a, b=0.0):
    return np.linalg.norm(np.ravel(np.asarray(a) - np.asarray(b)))


def assert_same_steps(masked, compact, count):
    """Compares each step of two runs that start it from the same state; returns the refreshes.

    Networks multiply rounding errors from step to step, so the masked run takes over the state of
    the compact one after each. Sets may differ in units that tie but for rounding.
    """
    one_run, other_run, refreshes = steps(masked, count), steps(compact, count), 0
    before = sent = None
    for i in range(1, count + 1):
        (run, loss, state), (held, other_loss, other) = one_run.send(sent), next(other_run)
        assert other_loss == pytest.approx(loss, rel=1e-4)
        after = jax.tree.map(np.array, held.representation.to_masked(other))
        if before is not None:
            columns = before.params, state.params, after.params
            for was, a, b in zip(*map(jax.tree.leaves, columns), strict=True):
                assert norm(a, b) <= 1e-5 * norm(a) + 0.01 * norm(a, was), f"step {i}"
        if i % 20 == 0:
            leaves = held.representation.sparse.plan.leaves(state.params)
            assert_same_sets(leaves.values(), dense_of(run, state), (after.params, after.opt_state))
            refreshes += 1
        before = after
        sent = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), after, state)
    return refreshes


def assert_same_sets(leaves, one, other):
    for masks, others in zip(tk.keep_masks(*one), tk.keep_masks(*other), strict=True):
        trees = (leaves, *map(jax.tree.leaves, (one[0], masks, others)))
        for leaf, theta, mask, other_mask in zip(*trees, strict=True):
            differs = np.asarray(mask != other_mask)
            if differs.any():
                size = np.asarray(
                    leaf.pattern.expand(leaf.pattern.magnitudes(abs(theta)), leaf.shape)
                )
                smallest = size[np.asarray(mask)].min()
                assert np.all(abs(size[differs] - smallest) <= 1e-4 * smallest)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_two_hundred_steps_are_those_of_the_masked_run(case):
    assert assert_same_steps(*configs(*case), 200) == 10


def toy_configs(*overrides):
    common = ("method.refresh_every=20", "steps=60", *ADAM, *overrides)
    return [
        toy_runs.config("80/60", *common, own)
        for own in ("method.inner_state=reset", "method.always_sparse=True")
    ]


@pytest.mark.parametrize(
    "pattern", [pytest.param("unstructured", marks=pytest.mark.slow), "block:4x2"]
)
def test_sixty_steps_are_those_of_the_masked_run(pattern):
    """A network that compiles fast."""
    assert assert_same_run(*toy_configs(f"method.pattern={pattern}"), 60) == 3


def rigl_configs(*overrides):
    common = ("method.refresh_every=10", "steps=60", *SGD, *overrides)
    return [
        toy_runs.config("rigl-80", *common, f"method.always_sparse={held}")
        for held in (False, True)
    ]


@pytest.mark.slow
def test_rigl_chooses_by_the_dense_gradient_of_leaves_that_no_device_holds():
    """Alone, and on eight devices, where the gradient is a sum over the parts of a batch."""
    masked, compact = rigl_configs("method.pattern=block:4x2")
    assert assert_same_run(masked, compact, 40) == 2
    together = rigl_configs("method.pattern=block:4x2", "mesh.data=4", "mesh.fsdp=2")[1]
    assert_followed(list(steps(compact, 31, jax.devices()[:1])), list(steps(together, 31)))


@pytest.mark.slow
def test_rigl_always_sparse_stopped_and_continued(tmp_path):
    overrides = ("method.name=rigl", "method.always_sparse=True", "method.refresh_every=3")
    assert toy_runs.run(tmp_path / "whole", "80/60", *overrides) == "finished"
    assert toy_runs.run(tmp_path / "parts", "80/60", *overrides, stop_at=9) == "stopped"
    assert toy_runs.run(tmp_path / "parts", "80/60", *overrides) == "finished"
    one, other = (
        toy_runs.last_state(tmp_path / n, "80/60", *overrides) for n in ("whole", "parts")
    )
    toy_runs.assert_same(one[0], other[0])


def test_eight_devices_follow_one():
    """A network that compiles fast."""
    half = "method.backward_density=0.5"
    (_, alone), (_, together) = toy_configs(half), toy_configs(half, "mesh.data=4", "mesh.fsdp=2")
    one, other = list(steps(alone, 42, jax.devices()[:1])), list(steps(together, 42))
    assert_followed(one, other)
    values = other[-1][2].params["in"]["kernel"]
    assert values.addressable_shards[0].data.size == values.size // 2


def test_devices_hold_nothing_dense():
    """No argument of the step, so no parameter, moment or place, has a sparse leaf's dense size."""
    _, config = configs("enwik8_small", ())
    run = build(config, jax.devices()[:1])
    dense = jax.tree.leaves(
        run.representation.sparse.masks(run.representation.init().reservoir)[1].sets
    )
    smallest = min(leaf.size for leaf in dense)
    held = jax.tree.leaves(find_compact(run.representation.abstract().opt_state).kernels)
    assert len(held) == len(dense) > 3
    embedding = run.representation.abstract().params["embedding"]["table"]["0"].size
    sizes = {
        leaf.size for leaf in jax.tree.leaves(run.representation.abstract()._replace(reservoir=()))
    }
    memory = run.representation.abstract().model_state.states.size
    assert max(sizes - {embedding, memory}) < smallest


SIZES = ("model.d_model=48", "model.n_head=2", "model.d_head=40", "model.d_inner=112",
         "model.n_layer=1", "batch_size=1", "model.train.target=8", "model.train.memory=8",
         "model.scan=False", "method.refresh_every=100")  # fmt: skip
KERNELS = {"attention": 48 * 80, "feed-forward": 48 * 112}  # nothing else is of these sizes


def buffers(overrides):
    """Sizes of all buffers of a compiled step."""
    run = build(resolve(f"{ROOT / 'configs' / 'enwik8_small.py'}:75/50,smoke", overrides),
                jax.devices()[:1])  # fmt: skip
    return buffer_sizes(
        run.step.lower(run.representation.abstract(), run.task.example_batch()).compile()
    )


def test_the_compiled_step_of_blocks_has_no_buffer_of_a_dense_size():
    compact = buffers((*SIZES, "method.pattern=block:8x8", "method.always_sparse=True"))
    masked = buffers((*SIZES, "method.pattern=block:8x8"))
    for name, size in KERNELS.items():
        assert size in masked, f"{name}: the search would not find one"
        assert size not in compact, name


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["unstructured", "block:8x8"])
def test_eight_devices_follow_one_with_stacked_layers(pattern):
    overrides = ("batch_size=8", *ADAM, f"method.pattern={pattern}", FEW["enwik8_small"])
    alone = resolved(overrides)
    together = resolved((*overrides, "mesh.data=4", "mesh.fsdp=2"))
    one = list(steps(alone, 22, jax.devices()[:1]))
    other = list(steps(together, 22))
    assert_followed(one, other)
    values = other[-1][2].params["layers"]["feed_forward"]["up"]["kernel"]
    assert values.addressable_shards[0].data.size == values.size // 2


def assert_followed(one, other):
    """Losses of every step are close, and the last sets the same."""
    np.testing.assert_allclose([s[1] for s in other], [s[1] for s in one], atol=1e-5)
    sets, others = one[-1][2].reservoir.sets, other[-1][2].reservoir.sets
    for name, flags in sets.items():
        np.testing.assert_array_equal(flags, others[name])


def resolved(overrides):
    return configs("enwik8_small", overrides)[1]


@pytest.mark.parametrize("delay", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_stopped_and_continued_is_the_uninterrupted_run_to_the_bit(tmp_path, delay):
    """Stopped between a choice and its use, where there is a delay, and after the freeze."""
    own = ("method.always_sparse=True", "method.refresh_every=4", f"method.refresh_delay={delay}",
           "method.stop_exploring_at=17", "optimizer.momentum=0.9")  # fmt: skip
    toy_runs.run(tmp_path / "whole", "80/60", *own)
    for stop in (9, 18, None):
        toy_runs.run(tmp_path / "parts", "80/60", *own, stop_at=stop)
    one, other = (
        toy_runs.last_state(tmp_path / name, "80/60", *own) for name in ("whole", "parts")
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert toy_runs.records(tmp_path / "whole") == toy_runs.records(tmp_path / "parts")


def test_a_delay_is_not_ignored():
    config = lambda delay: toy_runs.config(  # noqa: E731
        "80/60", "method.always_sparse=True", "method.refresh_every=4",
        f"method.refresh_delay={delay}", "optimizer.learning_rate=0.3",
    )  # fmt: skip
    *_, (_, _, now) = steps(config(0), 8)
    *_, (_, _, later) = steps(config(3), 8)
    assert any(np.any(now.reservoir.sets[n] != later.reservoir.sets[n]) for n in now.reservoir.sets)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("method.refresh_delay=2",),
            "refresh_delay: is read only with config.method.always_sparse=True",
        ),
        (("method.always_sparse=True", "method.inner_state=keep"), "always sparse always resets"),
        (("method.pattern=block:8x8", "method.backend=xla"), "backend: is read only with"),
        (("method.always_sparse=True", "method.refresh_delay=-1"), "integer of at least 0"),
        (("method.always_sparse=True", "method.refresh_delay=100"), "must be below refresh_every"),
        (("method.always_sparse=True", "method.backend=cuda"), "method.backend: found 'cuda'"),
        (("method.always_sparse=True", "method.backend=pallas_tpu"), "no pattern of blocks"),
        (
            ("method.name=static_random", "method.always_sparse=True", "method.refresh_delay=3"),
            "refresh_delay: static_random does not read it",
        ),
        (("method.always_sparse=yes",), "expected bool"),
    ],
)
def test_mistakes(overrides, words):
    with pytest.raises(UserError, match=words):
        toy_runs.config("80/60", *overrides)
    with pytest.raises(UserError, match="dense does not read it"):
        toy_runs.config("dense", "method.always_sparse=True")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.pattern=block:7x7"], "does not divide the last two axes"),
        (["method.pattern=block:7x7"], "or leave that leaf dense by config.method.rules"),
        (
            ["method.pattern=block:16x16", "method.backend=pallas_gpu"],
            "config.method.backend: found 'pallas_gpu'; must be None or 'xla' or 'native_cpu' on "
            "devices of cpu",
        ),
        (["method.pattern=block:16x16", "method.backend=pallas_tpu"], "must be None or 'xla' or"),
    ],
)
def test_mistakes_that_need_the_model_are_one_line(tmp_path, capsys, overrides, words):
    flags = [f"--config.{o}" for o in ("method.always_sparse=True", *overrides)]
    spec = f"{ROOT / 'configs' / 'enwik8_small.py'}:90/80,smoke"
    assert main.main([f"--config={spec}", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("blocks", ["8x8", "16x16"])
def test_a_backend_for_these_devices_must_take_the_blocks(monkeypatch, blocks):
    monkeypatch.setitem(products.KERNELS, "pallas_gpu", ("cpu", products.pallas_gpu))
    monkeypatch.setitem(representation._DEVICES, "cpu", "cpu")
    config = toy_runs.config(
        "80/60", "method.always_sparse=True", f"method.pattern=block:{blocks}", "model.hidden=64",
        "method.backend=pallas_gpu", """method.rules=(("in/kernel", "sparse"), (".*", "dense"))""",
    )  # fmt: skip
    if blocks == "16x16":
        assert build(config).config.method.backend == "pallas_gpu"
        return
    with pytest.raises(UserError, match="in/kernel refused: blocks must be powers of 2"):
        build(config)


@pytest.mark.parametrize("pattern", ["block:8x8", "unstructured"])
def test_what_a_run_with_the_products_of_the_cpu_needs(monkeypatch, native_cpu, pattern):
    overrides = ["method.always_sparse=True", f"method.pattern={pattern}", "model.hidden=64"]
    overrides += ["method.backend=native_cpu"]
    overrides += ["""method.rules=(("in/kernel", "sparse"), (".*", "dense"))"""]
    config = toy_runs.config("80/60", *overrides)
    if pattern == "unstructured":
        with pytest.raises(UserError, match="in/kernel refused: single entries need one device"):
            build(config)
    assert build(config, jax.devices()[:1]).config.method.backend == "native_cpu"
    monkeypatch.setattr(products.native_cpu.native_library, "unavailable", lambda: "not compiled")
    with pytest.raises(UserError, match="in/kernel refused: not compiled"):
        build(config, jax.devices()[:1])
