"""The loops of docs/integrations.md: all make the same steps, and none loses the reservoir."""

import functools
import itertools
import pathlib
import re
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import topkast_jax as tk
from topkast_jax.trees import flatten_with_names

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs/integrations.md"
PARTS = dict(part.split("\n", 1) for part in f"SETUP\n{DOCUMENT.read_text()}".split("\n## "))
BLOCKS = {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in
          PARTS.items()}  # fmt: skip
ON_THE_PLAIN_LOOP = [
    "Several devices", "Evaluation and sampling", "Inside and around optax wrappers",
    "Which leaves are sparse",
]  # fmt: skip


@functools.cache
def run(title, block=0):
    """The names that a block of the document leaves, run after those that it builds on."""
    if block:
        scope = dict(run(title, block - 1))
    elif title in ON_THE_PLAIN_LOOP:
        scope = dict(run("Plain loop"))
    else:
        scope = {} if title == "SETUP" else dict(run("SETUP"))
    exec(compile(BLOCKS[title][block], f"{DOCUMENT.name}: {title}", "exec"), scope)
    return scope


def haiku_stand_in():
    """What the document uses of Haiku, with Haiku's tree of parameters."""

    def mlp(sizes):
        def init(key, x):
            widths = [x.shape[-1], *sizes]
            return {
                f"mlp/~/linear_{i}": {
                    "w": jax.random.normal(jax.random.fold_in(key, i), shape) / 4,
                    "b": jnp.zeros(shape[1]),
                }
                for i, shape in enumerate(zip(widths, sizes, strict=False))
            }

        def apply(params, x):
            for i in range(len(sizes)):
                layer = params[f"mlp/~/linear_{i}"]
                x = (jax.nn.relu(x) if i else x) @ layer["w"] + layer["b"]
            return x

        return types.SimpleNamespace(init=init, apply=apply)

    haiku = types.ModuleType("haiku")
    haiku.nets = types.SimpleNamespace(MLP=lambda sizes: lambda _: mlp(sizes))
    haiku.transform = lambda function: function(None)
    haiku.without_apply_rng = lambda network: network
    return haiku


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch):
    try:
        import haiku  # noqa: F401
    except ModuleNotFoundError:
        monkeypatch.setitem(sys.modules, "haiku", haiku_stand_in())
    with jax.numpy_rank_promotion("allow"):  # biases are added to matrices
        yield


def test_blocks_are_short_and_each_is_run_by_a_test():
    assert {title: len(blocks) for title, blocks in BLOCKS.items()} == {
        "SETUP": 1, "Plain loop": 1, "Flax NNX": 2, "Flax linen": 1, "Equinox": 1, "Haiku": 1,
        "Several devices": 3, "Evaluation and sampling": 1, "Inside and around optax wrappers": 1,
        "Which leaves are sparse": 1, "Choosing settings": 0,
    }  # fmt: skip
    assert max(block.count("\n") for blocks in BLOCKS.values() for block in blocks) <= 40


def test_rules():
    scope = run("Which leaves are sparse")
    state = scope["blocks"].init(scope["params"])
    (forward, backward) = tk.keep_masks(scope["params"], state)
    assert (forward["hidden"]["kernel"].sum(), backward["hidden"]["kernel"].sum()) == (64, 128)
    assert forward["out"]["kernel"].all()
    assert forward["hidden"]["bias"].all()


# The same weights in every framework, and the steps from them.

STEPS = 8  # sets are chosen every 5
SHAPES = {
    "hidden/kernel": (16, 16), "hidden/bias": (16,), "out/kernel": (16, 16), "out/bias": (16,)
}  # fmt: skip
START = [
    np.random.default_rng(i).normal(0, 0.4, shape).astype(np.float32)
    for i, shape in enumerate(SHAPES.values())
]
EQUINOX = ("layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias")
HAIKU = tuple(f"mlp/~/linear_{i}/{name}" for i in (0, 1) for name in "wb")


class Loop(NamedTuple):
    """One of the document's loops.

    Attributes:
      title, block: where it stands.
      variables: what `train_step` takes before the batch.
      start: from the names of the block, with the weights in place of a tree's, to these.
      holds: from these to parameters and optimizer state.
      names: what the weights are called.
    """

    title: str
    block: int
    variables: tuple[str, ...]
    start: Callable
    holds: Callable = lambda params, opt_state: (params, opt_state)
    names: tuple[str, ...] = tuple(SHAPES)

    def put(self, tree):
        """The tree with the weights of the start in place of its own."""
        found, leaves, treedef = flatten_with_names(tree)
        new = {name: x.T if name.endswith("weight") else x
               for name, x in zip(self.names, START, strict=True)}  # fmt: skip
        return treedef.unflatten([
            jnp.asarray(new[name]) if name in new else x
            for name, x in zip(found, leaves, strict=True)
        ])  # fmt: skip

    def arrays(self, tree):
        """The tree's arrays, in the order and shapes of the start."""
        found, leaves, _ = flatten_with_names(tree)
        by_name = dict(zip(found, map(np.array, leaves), strict=True))
        return [by_name[name].T if name.endswith("weight") else by_name[name]
                for name in self.names]  # fmt: skip


def with_tx(params, scope):
    return params, scope["tx"].init(params)


def nnx_start(put, scope):
    model = scope["Model"](nnx.Rngs(3))
    nnx.update(model, put(nnx.state(model, nnx.Param)))
    return model, nnx.Optimizer(model, scope["tx"], wrt=nnx.Param)


def linen_start(put, scope):
    apply, tx = scope["model"].apply, scope["tx"]
    return (TrainState.create(apply_fn=apply, params=put(scope["params"]), tx=tx),)


def equinox_start(put, scope):
    model = put(scope["model"])
    return model, scope["tx"].init(eqx.filter(model, eqx.is_inexact_array))


PAIR = ("params", "opt_state")
LOOPS = {
    "plain": Loop("Plain loop", 0, PAIR, lambda put, s: with_tx(put(s["params"]), s)),
    "nnx.Optimizer": Loop(
        "Flax NNX", 0, ("model", "optimizer"), nnx_start,
        lambda model, optimizer: (nnx.state(model, nnx.Param), optimizer.opt_state)),
    "nnx": Loop("Flax NNX", 1, PAIR, lambda put, s: with_tx(put(s["params"]), s)),
    "linen": Loop(
        "Flax linen", 0, ("state",), linen_start, lambda state: (state.params, state.opt_state)),
    "equinox": Loop(
        "Equinox", 0, ("model", "opt_state"), equinox_start,
        lambda model, opt_state: (eqx.filter(model, eqx.is_inexact_array), opt_state), EQUINOX),
    "haiku": Loop("Haiku", 0, PAIR, lambda put, s: with_tx(put(s["params"]), s), names=HAIKU),
}  # fmt: skip


class Moment(NamedTuple):
    """Weights and sets before a step, and the loss that the step returns."""

    theta: list
    forward: list
    backward: list
    loss: float = np.nan


def seen(loop, carry):
    params, state = loop.holds(*carry)
    return Moment(loop.arrays(params), *map(loop.arrays, tk.keep_masks(params, state)))


@functools.cache
def history(kind):
    """Each step of a loop from the common weights."""
    loop = LOOPS[kind]
    scope = run(loop.title, loop.block)
    carry, moments = loop.start(loop.put, scope), []
    for _ in range(STEPS):
        before = seen(loop, carry)
        result = scope["train_step"](*carry, scope["batch"])
        # With nnx.Optimizer the step changes the model in place and returns the loss alone.
        *new, loss = result if isinstance(result, tuple) else (*carry, result)
        carry = tuple(new)
        moments.append(before._replace(loss=float(loss)))
    return [*moments, seen(loop, carry)]


def view(moment):
    return [np.where(mask, theta, 0) for theta, mask in zip(moment.theta, moment.forward,
                                                            strict=True)]  # fmt: skip


def logits(weights, x):
    kernel, bias, out_kernel, out_bias = weights
    return np.maximum(x @ kernel + bias, 0) @ out_kernel + out_bias


@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_trains_at_the_forward_view_and_keeps_the_reservoir(kind):
    moments = history(kind)
    batch = run("SETUP")["batch"]
    for before, after in itertools.pairwise(moments):
        expected = optax.softmax_cross_entropy_with_integer_labels(
            logits(view(before), batch["x"]), batch["label"]
        ).mean()
        np.testing.assert_allclose(before.loss, expected, rtol=1e-5)
        for old, new, backward in zip(before.theta, after.theta, before.backward, strict=True):
            assert old[~backward].tobytes() == new[~backward].tobytes()
            assert old.ndim == 1 or np.mean(old[backward] != new[backward]) > 0.9
    losses = [moment.loss for moment in moments[:-1]]
    assert losses[-1] < losses[0]
    for i, shape in enumerate(SHAPES.values()):
        for density, masks in ((0.1, moments[5].forward), (0.2, moments[5].backward)):
            wanted = oracle.select(moments[5].theta[i], density) if len(shape) == 2 else True
            np.testing.assert_array_equal(masks[i], np.broadcast_to(wanted, shape))
    assert any(np.any(a != b) for a, b in zip(moments[0].forward, moments[5].forward, strict=True))


def check_same(found, expected):
    for name in ("forward", "backward"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, name), getattr(expected, name))
    for theta, wanted in zip(found.theta, expected.theta, strict=True):
        np.testing.assert_allclose(theta, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in LOOPS if kind != "plain"])
def test_a_loop_makes_the_steps_of_the_plain_one(kind):
    for found, expected in zip(history(kind), history("plain"), strict=True):
        check_same(found, expected)


@pytest.mark.parametrize("kind", LOOPS)
def test_the_last_line_of_a_loop_evaluates_at_the_forward_view(kind):
    loop = LOOPS[kind]
    scope = run(loop.title, loop.block)
    end = seen(loop, tuple(scope[name] for name in loop.variables))
    np.testing.assert_allclose(
        scope["logits"], logits(view(end), scope["x"]), rtol=1e-4, atol=1e-5
    )  # fmt: skip
    for theta, forward in zip(end.theta[::2], end.forward[::2], strict=True):
        assert np.all(theta != 0)  # the reservoir is there
        assert forward.sum() == oracle.keep_count(theta.size, 0.1)


def test_the_nnx_step_carries_what_is_no_parameter():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(16, 16, rngs=rngs)
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    scope = run("Flax NNX")
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, scope["tx"], wrt=nnx.Param)
    losses = [float(scope["train_step"](model, optimizer, scope["batch"])) for _ in range(2)]
    assert np.all(np.asarray(model.norm.mean[...]) != 0)
    assert losses[0] != losses[1]
    assert model.dropout.rngs.count[...] == 2
    assert np.all(np.asarray(model.linear.kernel[...]) != 0)


# Several devices.


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_data_parallel_steps_are_those_of_one_device(kind):
    scope = run("Several devices", ["pmap", "shard_map"].index(kind))
    step = scope[f"{kind}_step"]
    assert scope["devices"] == 8
    loop = LOOPS["plain"]
    carry = loop.start(loop.put, scope)
    for expected in history("plain")[:-1]:
        check_same(seen(loop, carry), expected)
        *carry, loss = step(*carry, scope["shards"])
        np.testing.assert_allclose(loss, expected.loss, rtol=1e-4)


def test_members_of_an_ensemble_train_as_each_would_alone():
    scope = run("Several devices", 2)
    keys = jax.random.split(jax.random.key(1), 16)
    found = jax.device_get((scope["params"], scope["alphas"], scope["losses"]))
    for i in (0, 5, 15):
        params = scope["init"](keys[i])
        state = scope["tx"].init(params)
        for _ in range(3):
            params, state, loss = scope["train_step"](params, state, scope["batch"])
        alone = (params, tk.forward_params(params, state), loss)
        difference = jax.tree.map(lambda members, x, i=i: members[i] - x, found, alone)
        # Under vmap sums have another order: Adam takes a step of another sign where a gradient is
        # next to nothing, and two entries that tie may change places.
        assert optax.tree.norm(difference) <= 0.1 * optax.tree.norm(alone)
    kept = found[1]["hidden"]["kernel"] != 0
    assert np.any(kept[0] != kept[1])


# The rest.


def test_evaluation_and_sampling():
    scope = run("Evaluation and sampling")
    end = seen(LOOPS["plain"], (scope["params"], scope["opt_state"]))
    guesses = logits(view(end), scope["x"]).argmax(axis=1)
    assert scope["reached"] == pytest.approx(np.mean(guesses == scope["batch"]["label"]))
    assert scope["tokens"].shape == (10,)
    assert set(np.asarray(scope["tokens"]).tolist()) <= set(range(16))


@pytest.mark.parametrize(
    "name",
    ["clipped", "decayed", "accumulated", "scheduled", "grouped", "guarded", "looking_ahead",
     "schedule_free"],
)  # fmt: skip
def test_a_wrapper_of_the_list_makes_a_step(name):
    scope = run("Inside and around optax wrappers")

    def step(params):
        if name == "looking_ahead":
            params = optax.LookaheadParams.init_synced(params)
        state = scope[name].init(params)
        seen = params.fast if name == "looking_ahead" else params
        _, grads = tk.value_and_grad(scope["loss_fn"])(seen, state, scope["batch"])
        updates, state = scope[name].update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if name == "looking_ahead":
            return tk.forward_params(params.slow, state)
        if name == "schedule_free":
            params = optax.contrib.schedule_free_eval_params(state, params)
        return tk.forward_params(params, state)

    params = scope["init"](jax.random.key(0))
    alpha = jax.eval_shape(step, params)
    assert jax.tree.map(jnp.shape, alpha) == jax.tree.map(jnp.shape, params)
