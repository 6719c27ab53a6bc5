"""How tokens are drawn, and that each is drawn from what the model says of all before it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.language_modelling.generate import for_few_tokens
from experiments.language_modelling.models.settings import Lengths, TransformerXLConfig
from experiments.language_modelling.models.transformer_xl import LanguageModel
from experiments.language_modelling.sampling import Sampling, generate
from topkast_jax import FanIn
from topkast_jax.always_sparse import FanInKernel, from_masks
from topkast_jax.trees import flatten_with_names

CHANCES = np.array([0.15, 0.5, 0.05, 0.3])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.9}, [0, 1, 3]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 1, "top_p": 0.9}, [1]),
        ({"top_k": 3, "top_p": 0.6}, [1, 3]),
    ],
    ids=str,
)
def test_what_may_be_drawn(options, kept):
    logits = jnp.log(jnp.asarray(CHANCES))
    restricted = Sampling(**options).restrict(logits)
    assert np.flatnonzero(np.isfinite(restricted)).tolist() == kept
    np.testing.assert_array_equal(restricted[np.array(kept)], logits[np.array(kept)])


def test_drawn_as_often_as_it_is_probable():
    draw = jax.vmap(Sampling(temperature=0.5).draw, in_axes=(0, None))
    drawn = draw(jax.random.split(jax.random.key(0), 4_000), jnp.log(jnp.asarray(CHANCES)))
    expected = CHANCES**2 / (CHANCES**2).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4_000, expected, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-45])
def test_near_zero_temperature_draws_the_most_probable(temperature):
    draw = Sampling(temperature=temperature).draw
    assert draw(jax.random.key(0), jnp.log(jnp.asarray(CHANCES))) == np.argmax(CHANCES)


@pytest.fixture(scope="module")
def model():
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 8, "d_head": 4, "d_inner": 16}
    model = LanguageModel(TransformerXLConfig(n_token=23, cutoffs=(7, 15), **sizes))
    # Large weights: what comes next depends on all that came before.
    return model, jax.tree.map(lambda x: 20 * x, jax.jit(model.init)(jax.random.key(0)))


@pytest.mark.parametrize(
    "lengths", [Lengths(target=5, memory=16), Lengths(target=15, memory=0)], ids=str
)
def test_each_token_follows_from_all_before_it(model, lengths):
    (model, params), prompt = model, [3, 1, 4]
    found = generate(model, params, lengths, prompt, 12, Sampling(temperature=0.0), seed=0)
    assert len(found) == 12
    assert len(set(found)) > 3
    whole = jnp.array([[*prompt, *found]])

    @jax.jit
    def log_probs(params):
        hidden, _ = model.hidden(params, model.init_memory(1, lengths), whole, lengths)
        return model.log_probs(params, hidden[0])

    best = jnp.argmax(log_probs(params), axis=-1)
    assert best[2:-1].tolist() == found


def test_the_seed_decides(model):
    model, params = model
    lengths = Lengths(target=5, memory=16)

    def draw(seed, **options):
        return generate(model, params, lengths, [3], 12, Sampling(**options), seed)

    assert draw(1, temperature=50.0) == draw(1, temperature=50.0) != draw(2, temperature=50.0)
    assert draw(1, top_k=1) == draw(2, temperature=0.0)


def test_kernels_of_constant_fan_in_draw_the_same(model):
    model, params = model
    rng = np.random.default_rng(0)
    names, leaves, treedef = flatten_with_names(params)
    linear = [i for i, name in enumerate(names) if re.fullmatch(model.linear, name)]
    assert len(linear) == 2 * 7
    for i in linear:
        rank = rng.permuted(
            np.tile(np.arange(leaves[i].shape[0])[:, None], leaves[i].shape[1]), axis=0
        )
        leaves[i] = from_masks(np.asarray(leaves[i]), rank < 1, rank < 2, FanIn())
    compact = treedef.unflatten(leaves)
    ordered = for_few_tokens(compact, model.linear)
    kinds = jax.tree.leaves(ordered, is_leaf=lambda x: isinstance(x, FanInKernel))
    assert sum(isinstance(kind, FanInKernel) for kind in kinds) == 2 * 7
    lengths = Lengths(target=5, memory=16)
    memories = [model.init_memory(1, lengths)] * 2
    following = jax.jit(model.next_log_probs, static_argnums=3)
    for token in (3, 1, 4):
        found = [
            following(p, memory, jnp.array([[token]]), lengths)
            for p, memory in zip((compact, ordered), memories, strict=True)
        ]
        one, other = (np.asarray(log_probs) for log_probs, _ in found)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
        memories = [memory for _, memory in found]
