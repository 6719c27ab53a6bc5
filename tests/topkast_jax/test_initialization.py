"""Initial parameters of sparse layers against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

RULES = [("stack", tk.Sparse(stacked=1)), ("kernel", tk.Sparse()), (".*", tk.Dense())]


def test_kept_entries_have_the_variance_of_their_fan_in():
    rng = np.random.default_rng(0)
    params = {
        "kernel": rng.normal(size=(3, 3, 4, 8)),
        "stack": rng.normal(size=(20, 3, 6)),  # three layers of 20 inputs
        "bias": rng.normal(size=8),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    tx = tk.static_random(optax.sgd(0.1), 0.2, seed=1, rules=RULES)
    state = tx.init(params)
    scaled = tk.scale_to_fan_in(params, state, tx)
    masks = jax.device_get(tk.keep_masks(params, state)[0])
    for output in range(8):
        kept = masks["kernel"][..., output]
        expected = np.where(kept, np.sqrt(36 / max(kept.sum(), 1)), 1)
        np.testing.assert_allclose(
            scaled["kernel"][..., output], params["kernel"][..., output] * expected, rtol=1e-6
        )
    for layer in range(3):
        for output in range(6):
            kept = masks["stack"][:, layer, output]
            expected = np.where(kept, np.sqrt(20 / max(kept.sum(), 1)), 1)
            np.testing.assert_allclose(
                scaled["stack"][:, layer, output],
                params["stack"][:, layer, output] * expected,
                rtol=1e-6,
            )
    assert scaled["bias"] is params["bias"]
    assert len({int(n) for n in masks["kernel"].sum((0, 1, 2))}) > 1


def test_a_chain_in_place_of_the_method_is_refused():
    params = {"kernel": jnp.ones((4, 4))}
    tx = optax.chain(tk.top_kast(optax.sgd(0.1), 0.5, 0.5))
    with pytest.raises(tk.SparsityError, match="tx is a GradientTransformationExtraArgs; must be"):
        tk.scale_to_fan_in(params, tx.init(params), tx)


def test_a_method_that_keeps_everything_at_first_is_refused():
    params = {"kernel": jnp.ones((4, 4))}
    tx = tk.methods.get("snip")(optax.sgd(0.1), 0.5)
    with pytest.raises(tk.SparsityError, match="SNIP? keeps everything until the first gradient"):
        tk.scale_to_fan_in(params, tx.init(params), tx)
