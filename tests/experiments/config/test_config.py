"""Overrides, validation and derived values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_config  # noqa: F401  # registers the task
from toy_runs import config

import topkast_jax as tk
from experiments.config import base_config, load, override
from experiments.errors import UserError
from experiments.records.workdir import as_json
from experiments.training import methods, optimizers
from experiments.training.optimizers import make_compact, make_dense, make_masked

BAD_OVERRIDES = {
    "stepz=3": "no key 'stepz'; did you mean 'steps'?",
    "optimizer.lr=3": "no key 'lr'; allowed: ",
    "steps.more=3": "no key 'more'",
    "derived.learning_rate=3": "no key 'derived'",
    "optimizer=sgd": "--config.optimizer: is a section; set one of b1",
    "steps": "--config.steps: no value",
    "steps=many": "--config.steps=many: expected int",
    "steps=1.5": "--config.steps=1.5: expected int",
    "steps=True": "--config.steps=True: expected int",
    "steps=None": "--config.steps=None: expected int",
    "eval_at_end=3": "--config.eval_at_end=3: expected bool",
    "steps={[1]}": "--config.steps={[1]}: expected int",
    f"optimizer.learning_rate={10**400}": "--config.optimizer.learning_rate=1000",
    f"steps={'-' * 5_000}1": "--config.steps=----",
    "optimizer.learning_rate=fast": "expected float",
    "optimizer.nesterov=1.0": "expected bool",
    "steps=0": "config.steps: found 0; must be an integer of at least 1",
    "seed=-1": "config.seed: found -1; must be",
    "log_every=0": "config.log_every: found 0",
    "keep_checkpoints=0": "config.keep_checkpoints: found 0",
    "optimizer.learning_rate=0": "learning_rate: found 0.0; must be a number above 0",
    "optimizer.momentum=1.5": "config.optimizer.momentum: found 1.5; must be",
    "optimizer.name=sdg": "config.optimizer.name: found 'sdg'; must be one of sgd, adam",
    "optimizer.weight_decay=0.1": "config.optimizer.weight_decay: sgd does not read it",
    "optimizer.b1=0.5": "sgd does not read it; it reads",
    "optimizer.schedule.name=linear": "must be one of constant, cosine, step",
    "optimizer.schedule.final_factor=0.1": "constant does not read it",
    "optimizer.schedule.name=step": "boundaries: found none",
    "optimizer.schedule.warmup_steps=20": "warmup_steps: found 20; must be below steps=20",
    "method.name=riglet": "config.method.name: found 'riglet'; must be one of dense, ",
    "method.drop_fraction=0.5": "config.method.drop_fraction: top_kast does not read it",
    "method.forward_density=0": "config.method.forward_density=0.0: must be a number in (0, 1]",
    "method.forward_density=1.1": "config.method.forward_density=1.1: must be",
    "method.forward_density=nan": "config.method.forward_density",
    "method.backward_density=0.1": "method.backward_density=0.1 is below forward_density=0.2",
    "method.refresh_every=0": "config.method.refresh_every=0: must be",
    "method.exploration_norm=l3": "config.method.exploration_norm='l3': must be 'l2' or 'l1'",
    "method.inner_state=drop": "config.method.inner_state='drop': must be 'keep' or 'reset'",
    "method.pattern=block:4": "must be 'unstructured', 'block:RxC', 'N:M', ",
    "method.pattern=block:0x4": "config.method.pattern: found 'block:0x4'; Block rows=0: must be",
    "method.pattern=columns": "found 'columns'; must be 'unstructured', 'block:RxC', 'N:M', 'chan",
    "method.pattern=4:2": "config.method.pattern: found '4:2'; NOfM(4, 2): must be integers with 1",
    "method.pattern=0:4": "config.method.pattern: found '0:4'; NOfM(0, 4): must be integers with 1",
    "method.rules=(('.*',{'pattern':'3:2'}),)": "found '3:2'; NOfM(3, 2): must be integers with 1",
    "method.distribution=even": "config.method.distribution='even': must be 'uniform' or 'erk'",
    "method.stop_exploring_at=-1": "must be None or an integer of at least 0",
    "method.rules=(('.*','sparze'),)": "config.method.rules: found",
    "method.rules=(('.*',{'density':1}),)": "config.method.rules: found",
    "mesh.data=0": "config.mesh.data: found 0",
    "mesh.fsdp=-1": "at most one of them may be -1",
    "model.hidden=0": "config.model.hidden: found 0; must be at least 1",
}


@pytest.mark.parametrize("text", BAD_OVERRIDES)
def test_bad_override(text):
    with pytest.raises(UserError) as error:
        config("80/60", text)
    assert BAD_OVERRIDES[text] in str(error.value)
    assert "\n" not in str(error.value)


def test_a_config_records_the_arguments_that_made_it():
    made = config("80/60", "seed=1", "steps=30")
    file = made.command[0].removeprefix("--config=")
    assert file.endswith("toy_config.py:80/60")
    assert made.command[1:] == ("--config.steps=30",)  # The seed is of one run.


def test_a_path_may_be_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    changed = base_config("image_classification")
    override(changed, "data.dir=~/images")
    assert changed.data.dir == "/somewhere/images"


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("eval_at_end=false", "eval_at_end", False),
        ("method.stop_exploring_at=7", "method.stop_exploring_at", 7),
        ("method.pattern=block:2x2", "method.pattern", "block:2x2"),
        ("optimizer.schedule.boundaries=[3,4]", "optimizer.schedule.boundaries", (3, 4)),
        ("optimizer.schedule.boundaries=3", "optimizer.schedule.boundaries", (3,)),
    ],
)
def test_override_keeps_the_type(text, key, expected):
    changed = base_config("toy")
    changed.method.name = "top_kast"
    methods.complete(changed)
    assert override(changed, text) == key
    for part in key.split("."):
        changed = changed[part]
    assert changed == expected
    assert type(changed) is type(expected)


@pytest.mark.parametrize("variant", ["", "dense", "80/60", "98/90", "static-90", "nan,90/80"])
def test_variants(variant):
    method = config(variant).method
    expected = {
        "": ("dense",),
        "dense": ("dense",),
        "80/60": ("top_kast", 0.2, 0.4),
        "98/90": ("top_kast", 0.02, 0.1),
        "static-90": ("static_random", 0.1),
        "nan,90/80": ("top_kast", 0.1, 0.2),
    }[variant]
    keys = ("name", "forward_density", "backward_density")
    assert tuple(method[k] for k in keys if k in method) == expected


@pytest.mark.parametrize("variant", ["90", "static", "a/b", "smoke", "90/80/70", "static-x"])
def test_bad_variant(variant):
    with pytest.raises(UserError, match=r"variant '.*': allowed: dense, F/B, static-F, .*nan"):
        config(variant)


def test_only_what_is_read_is_left():
    dense = as_json(config("dense"))
    assert dense["method"] == {"name": "dense"}
    assert set(as_json(config("static-90"))["method"]) == {
        "name", "forward_density", "seed", "rules", "pattern", "distribution", "always_sparse",
        "scale_to_fan_in",
    }  # fmt: skip
    assert "b1" not in dense["optimizer"]


def test_derived_values_follow_overrides():
    scaled = config(
        "80/60",
        "steps=200",
        "batch_size=64",
        "optimizer.reference_batch_size=32",
        "optimizer.schedule.name=step",
        "optimizer.schedule.boundaries=(30,70)",
        "optimizer.schedule.warmup_steps=5",
        "optimizer.schedule.reference_steps=100",
    )
    assert scaled.derived.learning_rate == pytest.approx(0.2)
    assert scaled.derived.boundaries == (60, 140)
    assert scaled.derived.warmup_steps == 10


@pytest.mark.parametrize("spec", ["nowhere.py", "README.md", "tests", ":dense"])
def test_no_config_file(spec):
    with pytest.raises(UserError, match="no such file"):
        load(spec)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("x = 1", UserError, "bad.py defines no get_config()"),
        ("def get_config(): pass", UserError, "get_config() of {}/bad.py takes no variant"),
        ("from experiments.config import base_config\nbase_config('tooy')", UserError, "'tooy'"),
        ("def get_config(:", SyntaxError, "invalid syntax"),
        ("import nothing_like_it", ModuleNotFoundError, "nothing_like_it"),
        ("def get_config(v): return {}['stepz']", KeyError, "stepz"),
        ("from experiments.config import base_config\nbase_config('toy').stepz = 1",
         AttributeError, "stepz"),
    ],
)  # fmt: skip
def test_bad_config_file(tmp_path, text, error, message):
    """A mistake inside the file is raised as it is, so that its traceback names the line."""
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(error) as found:
        load(f"{path}:dense")
    assert message.replace("{}", str(tmp_path)) in str(found.value)
    frames = [frame.path for frame in found.traceback]
    if error not in (UserError, SyntaxError):
        assert str(path) in map(str, frames)


def make_optimizer(made, params):
    """The optimizer of a run that is not always sparse."""
    dense = made.method.name == "dense"
    return make_dense(made, params) if dense else make_masked(made, params)[1]


PARAMS = {
    "a": np.ones((4, 8), np.float32),
    "b": np.ones((8, 4), np.float32),
    "c": np.ones(4, np.float32),
}
RULES = "method.rules=(('a','sparse'),('.*','dense'))"


def moved(*overrides, variant="80/60"):
    """How far one step with a zero gradient moves each leaf, over the learning rate."""
    made = config(variant, *overrides, "optimizer.learning_rate=1.0", "optimizer.momentum=0.0")
    tx = make_optimizer(made, jax.eval_shape(lambda: PARAMS))
    updates, _ = tx.update(jax.tree.map(np.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    return {name: -np.asarray(u) for name, u in updates.items()}


def test_l2_is_on_dense_matrices_where_the_method_has_its_own_penalty():
    u = moved("optimizer.l2=0.01", "method.exploration_weight=0.1", RULES)
    np.testing.assert_allclose(np.unique(u["a"]), [0, 0.1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(u["b"], 0.01, rtol=1e-6)
    np.testing.assert_array_equal(u["c"], 0)


def test_a_decoupled_penalty_follows_the_learning_rate():
    """With warm-up of two steps to a rate of 0.5, on A as AdamW, which the moments do not scale."""
    made = config(
        "80/60", RULES, "optimizer.name=adam", "optimizer.learning_rate=0.5",
        "optimizer.schedule.warmup_steps=2", "method.exploration_weight=0.0",
        "method.exploration_decay=0.1",
    )  # fmt: skip
    tx = make_optimizer(made, jax.eval_shape(lambda: PARAMS))
    state = tx.init(PARAMS)
    for rate in (0.25, 0.5, 0.5):
        updates, state = tx.update(jax.tree.map(np.zeros_like, PARAMS), state, PARAMS)
        expected = [-rate * 0.1 / 0.2, -rate * 0.1, 0]
        np.testing.assert_allclose(np.unique(updates["a"]), expected, rtol=1e-6)
        np.testing.assert_array_equal(updates["b"], 0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("name=sgd", "momentum=0.8", "nesterov=True"), optax.sgd(0.1, 0.8, nesterov=True)),
        (("name=adam", "b1=0.8", "b2=0.95", "eps=1e-3"), optax.adam(0.1, 0.8, 0.95, 1e-3)),
        (("name=rmsprop", "b2=0.95", "eps=1e-3", "momentum=0.8", "nesterov=True"),
         optax.rmsprop(0.1, 0.95, 1e-3, momentum=0.8, nesterov=True)),
    ],
    ids=["sgd", "adam", "rmsprop"],
)  # fmt: skip
def test_an_optimizer_has_the_settings_of_the_config(options, expected):
    made = config("dense", "optimizer.learning_rate=0.1", *(f"optimizer.{o}" for o in options))
    tx = make_optimizer(made, jax.eval_shape(lambda: PARAMS))
    state, other = tx.init(PARAMS), expected.init(PARAMS)
    for scale in (1.0, -0.3):
        grads = jax.tree.map(lambda x, s=scale: s * x, PARAMS)
        found, state = tx.update(grads, state, PARAMS)
        wanted, other = expected.update(grads, other, PARAMS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)


def test_l2_is_on_what_a_static_mask_keeps():
    u = moved("optimizer.l2=0.01", RULES, variant="static-75")
    np.testing.assert_allclose(np.sort(u["a"].ravel()), [0] * 24 + [0.01] * 8, rtol=1e-6)
    np.testing.assert_allclose(u["b"], 0.01, rtol=1e-6)


def test_l2_is_on_the_values_of_an_always_sparse_run():
    overrides = ("optimizer.l2=0.01", RULES, "method.always_sparse=True", "optimizer.momentum=0.0")
    made = config("static-75", *overrides, "optimizer.learning_rate=1.0")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sparse, tx = make_compact(made, jax.eval_shape(lambda: PARAMS), lambda shape: device)
    values, state, _ = sparse.start(PARAMS, tx)
    updates, _ = tx.update(jax.tree.map(np.zeros_like, values), state, values)
    assert {name: update.shape for name, update in updates.items()} == {
        "a": (8,), "b": (8, 4), "c": (4,)
    }  # fmt: skip
    for name, moved in (("a", -0.01), ("b", -0.01), ("c", 0)):
        np.testing.assert_allclose(updates[name], moved, rtol=1e-6)


def largest(scores, count, among):
    ranked = np.where(among, np.abs(scores), -1)
    return ranked >= np.sort(ranked, axis=None)[-count]


@pytest.mark.parametrize("name", ["rigl", "snfs", "snip"])
def test_methods_choose_by_the_gradient_of_the_loss_without_l2(name):
    """The sets after one step, and the step itself, against a plain NumPy version."""
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(16, 12)).astype(np.float32), "b": PARAMS["b"]}
    grads = {"a": rng.normal(size=(16, 12)).astype(np.float32), "b": 0 * PARAMS["b"]}
    options = ("optimizer.learning_rate=1e-3", "optimizer.momentum=0.0", "optimizer.l2=300.0")
    if name != "snip":
        options += ("method.refresh_every=1", "method.last_choice_at=16", "method.seed=3")
    made = config("", f"method.name={name}", "method.forward_density=0.25", RULES, *options)
    tx = make_optimizer(made, jax.eval_shape(lambda: params))
    state = tx.init(params)
    before = np.asarray(tk.keep_masks(params, state)[0]["a"])
    updates, state = tx.update(grads, state, params)
    after, scores = optax.apply_updates(params, updates), grads["a"]
    if name == "snip":
        expected = kept = largest(params["a"] * scores, 48, True)
    else:
        kept = before
        stays = largest(after["a"], 48 - int(0.15 * (1 + np.cos(np.pi / 16)) * 48), kept)
        expected = stays | largest(scores, 48 - stays.sum(), ~stays)
    np.testing.assert_array_equal(tk.keep_masks(after, state)[0]["a"], expected)
    moved = np.where(kept, -1e-3 * (scores + 300 * params["a"]), 0)
    np.testing.assert_allclose(updates["a"], moved, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(updates["b"], -0.3 * params["b"], rtol=1e-5)


def test_l2_is_on_all_matrices_of_a_dense_run():
    u = moved("optimizer.l2=0.01", variant="dense")
    np.testing.assert_allclose(u["a"], 0.01, rtol=1e-6)
    np.testing.assert_array_equal(u["c"], 0)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb", "adafactor", "rmsprop"])
def test_every_optimizer_steps(name):
    made = config("80/60", f"optimizer.name={name}", "optimizer.clip_global_norm=0.5")
    tx = make_optimizer(made, jax.eval_shape(lambda: PARAMS))
    state = tx.init(PARAMS)
    view = tk.forward_params(PARAMS, state)
    assert np.count_nonzero(view["a"]) == 6
    updates, _ = tx.update(PARAMS, state, PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    assert np.count_nonzero(new["a"] != PARAMS["a"]) == 13
    assert np.all(np.isfinite(new["a"]))


@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor"])
def test_decay_follows_the_learning_rate_and_spares_what_is_no_matrix(name):
    """Stacked layers make matrices of biases and scales, which are not decayed either."""
    params = {
        "layers": {"norm": {"scale": jnp.ones((3, 8))}, "up": {"bias": jnp.ones((3, 8))}},
        "kernel": jnp.ones((4, 8)),
    }
    options = ("optimizer.weight_decay=0.1", "optimizer.learning_rate=1e-3")
    made = config("dense", f"optimizer.name={name}", *options)
    tx = make_optimizer(made, jax.eval_shape(lambda: params))
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(still, tx.init(params), params)
    np.testing.assert_array_equal(updates["layers"]["norm"]["scale"], 0)
    np.testing.assert_array_equal(updates["layers"]["up"]["bias"], 0)
    # LAMB scales what it decays by to the norm of the parameters.
    expected = -1e-3 * (1.0 if name == "lamb" else 0.1)
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


def test_a_boundary_within_the_warm_up_is_refused():
    schedule = ("name=step", "boundaries=(3,9)", "warmup_steps=5")
    with pytest.raises(UserError, match="boundaries: found 3; must be above warmup_steps=5"):
        config("dense", *(f"optimizer.schedule.{text}" for text in schedule))


def test_boundaries_that_a_short_run_brings_together_all_count():
    made = config(
        "dense", "steps=20", "optimizer.learning_rate=1.0", "optimizer.schedule.name=step",
        "optimizer.schedule.boundaries=(100,110,1000)", "optimizer.schedule.factor=0.1",
        "optimizer.schedule.reference_steps=2000",
    )  # fmt: skip
    rates = [float(optimizers.make_schedule(made)(step)) for step in (0, 1, 9, 10, 19)]
    assert rates == pytest.approx([1, 0.01, 0.01, 0.001, 0.001])


def test_clipping_sees_only_the_gradient_that_is_used():
    options = ("optimizer.clip_global_norm=1.0", "method.exploration_weight=0.0")
    made = config("80/60", *options, RULES, "optimizer.learning_rate=1.0", "optimizer.momentum=0.0")
    tx = make_optimizer(made, jax.eval_shape(lambda: PARAMS))
    grads = {"a": np.full((4, 8), 1e3, np.float32), "b": 0 * PARAMS["b"], "c": 0 * PARAMS["c"]}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert np.linalg.norm(updates["a"]) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", tk.Unstructured()),
        ("block:2x4", tk.Block(2, 4)),
        ("2:4", tk.NOfM(2, 4)),
        ("channel", tk.Channel()),
        ("fan_in", tk.FanIn()),
    ],
)
def test_patterns_are_named_by_text(text, pattern):
    made = config("static-50", f"method.pattern={text}")
    assert methods.read_pattern(text) == pattern
    assert methods.pattern_text(pattern) == text
    tx = make_optimizer(made, jax.eval_shape(lambda: PARAMS))
    masks = tk.keep_masks(PARAMS, tx.init(PARAMS))[0]
    assert np.count_nonzero(masks["a"]) == 16
    if text == "channel":
        assert set(masks["a"].sum(0).tolist()) == {0, 4}
    if text in ("2:4", "fan_in"):
        assert set(masks["a"].sum(0).tolist()) == {2}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2:4", "a: forward_density=0.25 with NOfM(2, 4): must be 0.5"),
        ("1:3", "a: NOfM(1, 3) does not divide the last axis but one of (4, 8); choose another"),
        (
            "block:3x3",
            "the last two axes of (4, 8); choose another config.method.pattern, or leave",
        ),
    ],
)
def test_patterns_that_do_not_fit_are_one_line(text, told):
    made = config("static-75", f"method.pattern={text}")
    with pytest.raises((UserError, tk.SparsityError)) as error:
        make_optimizer(made, jax.eval_shape(lambda: PARAMS))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_random_masks_follow_the_seed():
    def mask(*overrides):
        tx = make_optimizer(config("static-75", *overrides), jax.eval_shape(lambda: PARAMS))
        return np.asarray(jax.tree.leaves(tx.init(PARAMS).sets)[0])

    assert np.array_equal(mask("seed=1"), mask("seed=1"))
    assert not np.array_equal(mask("seed=1"), mask("seed=2"))
    assert np.array_equal(mask("seed=1", "method.seed=5"), mask("seed=2", "method.seed=5"))


def section(name, *overrides, variant=""):
    """The section `method` that a config has of a method, without the trainer's own keys."""
    found = as_json(config(variant, f"method.name={name}", *overrides))["method"]
    own = ("name", "always_sparse", "distribution", "scale_to_fan_in")
    return {k: v for k, v in found.items() if k not in own}


def test_a_method_has_its_own_arguments_with_its_own_defaults(monkeypatch):
    def aaa(inner, forward_density=0.3, *, refresh_every=7, seed=0, exploration_norm="l1", p=1.5):
        return tk.static_random(inner, forward_density, seed)

    monkeypatch.setitem(tk.methods._FACTORIES, "aaa", aaa)
    assert section("aaa") == {
        "forward_density": 0.3, "refresh_every": 3, "seed": None, "exploration_norm": "l1", "p": 1.5
    }  # fmt: skip
    assert config("90/80").method.exploration_norm == "l2"
    assert section("static_random") == {
        "forward_density": 0.1, "seed": None, "rules": None, "pattern": "unstructured"
    }  # fmt: skip
    assert section("rigl")["refresh_every"] == 3  # The config file sets it, for Top-KAST.
    assert section("dnw")["refresh_every"] == 1
    assert section("dnw", "method.refresh_every=4")["refresh_every"] == 4
    assert methods.method_defaults("dnw")["refresh_every"] == 1
    assert {"backward_density", "inner_state", "seed"}.isdisjoint(section("dnw"))


def test_the_name_is_overridden_first_and_what_both_methods_have_is_kept():
    changed = section("static_random", "method.seed=4", variant="90/80")
    assert (changed["forward_density"], changed["seed"]) == (pytest.approx(0.1), 4)
    with pytest.raises(UserError, match="method.drop_fraction: top_kast does not read it; allowed"):
        config("", "method.drop_fraction=0.5", "method.name=top_kast")
    assert section("set", "method.drop_fraction=0.5", variant="80/60")["drop_fraction"] == 0.5
    # The last name counts, and the place of a name among the overrides does not.
    late = config("", "method.drop_fraction=0.5", "method.name=snip", "method.name=set").method
    assert (late.name, late.drop_fraction) == ("set", 0.5)


def test_what_a_config_file_may_set(monkeypatch):
    made = base_config("toy")
    with pytest.raises(AttributeError, match="did you mean 'refresh_every'"):
        made.method.refresh_evry = 3
    made.method.name = "snfs"
    made.method.momentum = 0  # Becomes a float, as the default is.
    with pytest.raises(TypeError, match="refresh_every"):
        made.method.refresh_every = "often"
    made.method.refresh_every, made.method.name = 5, "rigl"
    made.method.name = "snfs"
    methods.complete(made)
    assert (made.method.refresh_every, repr(made.method.momentum)) == (5, "0.0")
    monkeypatch.setitem(tk.methods._FACTORIES, "aaa", lambda inner, refresh_every="often": None)
    with pytest.raises(UserError, match="refresh_every: found 3; must be a str, like 'often'"):
        section("aaa")


def schedule(name, *overrides):
    method = config("", f"method.name={name}", *overrides).method
    return {k: method[k] for k in ("begin_at", "end_at", "last_choice_at") if k in method}


def test_schedules_follow_the_steps():
    """The toy config has 20 steps and a refresh every 3."""
    assert schedule("pruning", "steps=200") == {"begin_at": 40, "end_at": 160}
    assert schedule("pruning", "method.refresh_every=15") == {"begin_at": 4, "end_at": 15}
    assert schedule("pruning", "method.begin_at=0") == {"begin_at": 0, "end_at": 16}
    for name in ("rigl", "set", "snfs", "srigl"):
        assert schedule(name) == {"last_choice_at": 15}
        assert schedule(name, "method.last_choice_at=9") == {"last_choice_at": 9}
        assert schedule(name, "method.refresh_every=18") == {"last_choice_at": 19}
    assert schedule("snip") == schedule("dnw") == {}


@pytest.mark.parametrize(
    ("name", "overrides", "told"),
    [
        ("rigl", ("refresh_every=20",), "refresh_every: found 20; must be below steps=20, or rigl"),
        ("pruning", ("refresh_every=90",), "refresh_every: found 90; must be below steps=20, or"),
        (
            "set",
            ("last_choice_at=21",),
            "last_choice_at: found 21; must be at most 20 with steps",
        ),
        (
            "snfs",
            ("last_choice_at=3",),
            "last_choice_at=3 must be above refresh_every=3, or no ch",
        ),
        ("srigl", ("drop_fraction=1.0",), "drop_fraction=1.0: must be a number in (0, 1)"),
        ("rigl", ("drop_fraction=0",), "drop_fraction=0.0: must be a number in (0, 1)"),
        ("pruning", ("begin_at=9", "end_at=9"), "end_at=9 must be above begin_at=9"),
        ("pruning", ("begin_at=-1",), "begin_at=-1: must be an integer of at least 0"),
        ("pruning", ("end_at=19",), "end_at: found 19; must be at most 18, the last choice, with"),
    ],
)
def test_a_schedule_that_does_not_fit_is_one_line(name, overrides, told):
    with pytest.raises(UserError) as error:
        config("", f"method.name={name}", *(f"method.{text}" for text in overrides))
    assert str(error.value).startswith(f"config.method.{told}")
    assert "\n" not in str(error.value)


def test_a_factory_of_a_users_file(tmp_path, monkeypatch):
    (tmp_path / "own_factories.py").write_text(
        "import topkast_jax as tk\n"
        "def plain(inner, weight, block=tk.Block(4, 4), pattern=tk.NOfM(2, 4), other=object()):\n"
        "    assert weight == 2 and type(other) is object and block.rows == 4, (weight, other)\n"
        "    return tk.static_random(inner, 0.5, 0, pattern=pattern)\n"
        "def clash(inner, backend): ...\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert section("own_factories:plain", "method.weight=2") == {
        "weight": 2, "block": None, "pattern": "2:4", "other": None
    }  # fmt: skip
    for name, told in {
        "own_factories:plain": "config.method.weight: found None; own_factories:plain needs",
        "own_factories:clash": "'own_factories:clash' has an argument 'backend'; rename it",
        "own_factories:number": "found 'own_factories:number', a int; must be a factory",
        "own_factories:none": "own_factories has no 'none'",
        "no_such_file:none": "there is no module 'no_such_file'",
    }.items():
        with pytest.raises(UserError) as error:
            config("", f"method.name={name}")
        assert told in str(error.value)
        assert "\n" not in str(error.value)


def test_erk_without_rules():
    made = config("80/60", "method.distribution=erk")
    params = {"a": np.ones((64, 64), np.float32), "b": np.ones((8, 8), np.float32), "c": np.ones(4)}
    tx = make_optimizer(made, jax.eval_shape(lambda: params))
    view = tk.forward_params(params, tx.init(params))
    assert np.count_nonzero(view["b"]) == 64
    assert np.count_nonzero(view["a"]) + 64 == round(0.2 * (64 * 64 + 64))


def test_erk_is_on_the_leaves_that_uniform_densities_are_on():
    shapes = {
        "conv": {"kernel": (3, 3, 4, 8), "bias": (8, 8)},
        "norm_0": {"scale": (4, 8), "offset": (8,)},
        "heads": {"w": (8, 16), "b": (2, 8)},
        "thin": {"kernel": (1, 16)},
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda s: type(s) is tuple
    )

    def sparse(distribution):
        made = config("80/60", f"method.distribution={distribution}")
        leaves = make_masked(made, params)[0].plan.leaves(params)
        return {path for path, leaf in leaves.items() if leaf}

    assert sparse("erk") == sparse("uniform") == {"conv/kernel", "heads/w"}
