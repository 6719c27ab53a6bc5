"""What must hold for any Transformer-XL: size, causality, one result however it is computed."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import topkast_jax as tk
from experiments.errors import UserError
from experiments.language_modelling.models import layers
from experiments.language_modelling.models.settings import Lengths, TransformerXLConfig
from experiments.language_modelling.models.transformer_xl import LanguageModel, Memory
from topkast_jax.always_sparse import from_masks, is_compact, values_of, with_values
from topkast_jax.trees import flatten_with_names

SMALL = {"n_token": 23, "n_layer": 2, "n_head": 2, "d_model": 8, "d_head": 3, "d_inner": 10}
CLUSTERS = {"cutoffs": (5, 9), "div_val": 2, "tie_projs": (False, True, True)}
WT103 = {"n_token": 267735, "cutoffs": (20000, 40000, 200000)}
LENGTHS = Lengths(target=6, memory=4)
LANES = 8

SIZES = {  # the paper's table prints 277.2, 41.05, 284.1 and 151.1 M
    "enwik8_large": (
        {"n_token": 204, "n_layer": 24, "d_model": 1024, "n_head": 8, "d_head": 128,
         "d_inner": 3072},
        277_231_820,
    ),
    "enwik8_base": (
        {"n_token": 204, "n_layer": 12, "d_model": 512, "n_head": 8, "d_head": 64, "d_inner": 2048},
        41_055_436,
    ),
    "wikitext103_large": (
        {**WT103, "n_layer": 18, "d_model": 1024, "n_head": 16, "d_head": 64, "d_inner": 4096,
         "div_val": 4, "tie_projs": (True,) * 4},
        284_121_930,
    ),
    "wikitext103_base": (
        {**WT103, "n_layer": 16, "d_model": 410, "n_head": 10, "d_head": 41, "d_inner": 2100,
         "tie_projs": (False, True, True, True)},
        151_107_538,
    ),
}  # fmt: skip


def _small(**changed):
    return LanguageModel(TransformerXLConfig(**{**SMALL, **changed}))


def _params(model):
    return jax.jit(model.init)(jax.random.key(0))


def _data(seed=1):
    tokens = jax.random.randint(jax.random.key(seed), (LANES, 7), 0, SMALL["n_token"])
    return tokens[:, :-1], tokens[:, 1:]


def _full_memory(model, seed=2):
    empty = model.init_memory(LANES, LENGTHS)
    states = jax.random.normal(jax.random.key(seed), empty.states.shape)
    return Memory(states.astype(empty.states.dtype), jnp.int32(3))


def _loss_and_gradient(model, params, memory=None, rng=None):
    memory = _full_memory(model) if memory is None else memory

    def loss(params, memory, rng):
        nll, memory = model.apply(params, memory, *_data(), LENGTHS, rng=rng)
        return nll.mean(), memory

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params, memory, rng)


def _close(a, b, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_parameter_count(name, scan):
    sizes, count = SIZES[name]
    model = LanguageModel(TransformerXLConfig(**sizes, scan=scan))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_params)) == count


def test_parameter_paths():
    def paths(model):
        leaves = jax.tree_util.tree_flatten_with_path(model.abstract_params)[0]
        return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}

    plain, scanned = paths(_small(**CLUSTERS)), paths(_small(**CLUSTERS, scan=True))
    assert plain["layers/1/attention/query/kernel"] == (8, 6)
    assert plain["layers/1/feed_forward/up/kernel"] == (8, 10)
    assert scanned["layers/feed_forward/up/kernel"] == (2, 8, 10)
    rest = {path: shape for path, shape in plain.items() if not path.startswith("layers/")}
    assert rest == {
        "attention_bias/content": (6,),
        "attention_bias/position": (6,),
        "embedding/projection/0": (8, 8),
        "embedding/projection/1": (4, 8),
        "embedding/projection/2": (2, 8),
        "embedding/table/0": (5, 8),
        "embedding/table/1": (4, 4),
        "embedding/table/2": (14, 2),
        "softmax/bias/0": (5,),
        "softmax/bias/1": (4,),
        "softmax/bias/2": (14,),
        "softmax/cluster/bias": (2,),
        "softmax/cluster/table": (2, 8),
        "softmax/projection/0": (8, 8),
    }


def test_initialisation():
    model = _small(**CLUSTERS | {"d_model": 64, "d_inner": 100, "d_head": 32, "n_token": 2000})
    params = _params(model)
    layer = params["layers"]["0"]
    for array, mean, std in (
        (layer["attention"]["key"]["kernel"], 0, 0.02),
        (layer["feed_forward"]["up"]["kernel"], 0, 0.02),
        (params["embedding"]["table"]["2"], 0, 0.02),
        (params["embedding"]["projection"]["0"], 0, 0.01),
        (params["softmax"]["projection"]["0"], 0, 0.01),
        (params["softmax"]["cluster"]["table"], 0, 0.02),
        (params["attention_bias"]["content"], 0, 0.02),
        (layer["attention_norm"]["scale"], 1, 0.02),
        (layer["attention_norm"]["bias"], 0, 0),
        (layer["feed_forward"]["up"]["bias"], 0, 0),
        (params["softmax"]["bias"]["2"], 0, 0),
    ):
        assert abs(array.mean() - mean) <= 4 * std / math.sqrt(array.size)
        assert abs(array.std() - std) <= 3 * std / math.sqrt(array.size)
    kernels = [layer["attention"][part]["kernel"] for part in ("query", "key", "value", "position")]
    kernels.append(params["layers"]["1"]["attention"]["query"]["kernel"])
    assert len({float(kernel[0, 0]) for kernel in kernels}) == len(kernels)


def test_no_gradient_from_the_future_nor_into_memory():
    model = _small()
    params, (tokens, targets) = _params(model), _data()
    nothing_BxTxD = jnp.zeros((*tokens.shape, SMALL["d_model"]))
    memory = _full_memory(model)

    @jax.jit
    @functools.partial(jax.grad, argnums=(1, 2))
    def gradient(t, added_BxTxD, states):
        """Of lane 0's likelihood at place t, by what is added to each embedding, and by memory."""
        inner = model._model(params)
        embed = inner.embedding
        inner.embedding = lambda tokens: embed(tokens) + added_BxTxD
        hidden, _ = inner(tokens, Memory(states, memory.valid), LENGTHS, None)
        return inner.softmax.nll(hidden, targets, embed)[0, t]

    parts = [gradient(t, nothing_BxTxD, memory.states) for t in range(6)]
    size_TxBxT = np.stack([jnp.abs(by_input).max(-1) for by_input, _ in parts])
    by_memory = np.stack([part for _, part in parts])
    assert (size_TxBxT[:, 1:] == 0).all()
    for t in range(6):
        assert (size_TxBxT[t, 0, : t + 1] > 0).all()
        assert (size_TxBxT[t, 0, t + 1 :] == 0).all()
    assert (by_memory == 0).all()


def test_invalid_memory_is_not_read_and_valid_memory_is():
    model = _small()
    params, memory = _params(model), _full_memory(model)

    @jax.jit
    def loss(states):
        return model.apply(params, Memory(states, memory.valid), *_data(), LENGTHS)[0].mean()

    assert loss(memory.states.at[:, :, 0].set(1e3)) == loss(memory.states)
    assert loss(memory.states.at[:, :, 1].set(1e3)) != loss(memory.states)


@pytest.fixture(scope="module")
def with_dropout():
    model = _small(dropout=0.2, dropatt=0.1)
    params = _params(model)
    return params, _loss_and_gradient(model, params, rng=jax.random.key(3))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"scan": True}, marks=pytest.mark.slow),
        pytest.param({"remat": True}, marks=pytest.mark.slow),
        {"scan": True, "remat": True},
    ],
    ids=str,
)
def test_scan_and_remat_change_no_number(with_dropout, changed):
    params, ((loss, memory), gradient) = with_dropout
    other = _small(dropout=0.2, dropatt=0.1, **changed)
    other_params = _params(other)
    (loss_2, memory_2), gradient_2 = _loss_and_gradient(other, other_params, rng=jax.random.key(3))
    if "scan" in changed:
        params, gradient = _stacked(params), _stacked(gradient)
    jax.tree.map(np.testing.assert_array_equal, params, other_params)
    _close(loss, loss_2, rtol=1e-6)
    _close(memory, memory_2, atol=1e-5)
    _close(gradient, gradient_2, rtol=1e-4, atol=1e-7)


def test_dropout_is_where_the_reference_has_it_and_keeps_the_mean(monkeypatch):
    y = np.asarray(layers.dropout(jnp.ones(4000), 0.2, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0, 1.25], rtol=1e-6)
    assert abs((y == 0).mean() - 0.2) < 0.04
    seen = []
    for module in ("transformer_xl", "attention"):
        monkeypatch.setattr(
            importlib.import_module(f"experiments.language_modelling.models.{module}"),
            "dropout",
            lambda x, rate, rng: seen.append((rate, x.shape, rng is None)) or x,
        )
    model = _small(n_layer=1, dropout=0.2, dropatt=0.1)
    memory = model.init_memory(LANES, LENGTHS)
    run = lambda p, key: model.apply(p, memory, *_data(), LENGTHS, rng=key)  # noqa: E731
    jax.eval_shape(run, model.abstract_params, jax.random.key(0))
    shapes = [(8, 6, 8), (10, 8), (2, 8, 6, 10), (8, 6, 8), (8, 6, 10), (8, 6, 8), (8, 6, 8)]
    assert seen == [(0.1 if len(s) == 4 else 0.2, s, False) for s in shapes]


def _stacked(params):
    layers = list(params["layers"].values())
    return {**params, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


@pytest.mark.slow
def test_lanes_over_eight_devices():
    model = _small(**CLUSTERS)
    params, memory = _params(model), _full_memory(model)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.jit(lambda *arguments: model.apply(*arguments, LENGTHS))
    nll, next_memory = step(params, memory, *_data())

    def place(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    split = Memory(place(memory.states, None, "data"), place(memory.valid))
    data = [place(x, "data") for x in _data()]
    split_nll, split_memory = step(jax.device_put(params, NamedSharding(mesh, P())), split, *data)
    assert len(split_nll.sharding.device_set) == 8
    _close(split_nll, nll, rtol=1e-5)
    _close(split_memory, next_memory, atol=1e-5)


def test_bfloat16_compute_is_close_and_parameters_stay_float32():
    plain, half = _small(), _small(dtype="bfloat16")
    params = _params(half)
    memory = _full_memory(half)
    (loss, next_memory), gradient = _loss_and_gradient(half, params, memory)
    (expected, _), expected_gradient = _loss_and_gradient(plain, params, memory)
    assert loss.dtype == jnp.float32
    assert next_memory.states.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert loss != expected
    assert abs(loss - expected) < 1e-2
    top, other = gradient["embedding"]["table"]["0"], expected_gradient["embedding"]["table"]["0"]
    assert jnp.abs(top - other).max() < 0.05 * jnp.abs(other).max()


@pytest.mark.parametrize("rate", [{"dropout": 0.3}, {"dropatt": 0.3}], ids=str)
def test_dropout_in_training_alone(rate):
    plain, model = _small(n_layer=1), _small(n_layer=1, **rate)
    params, memory = _params(plain), _full_memory(plain)
    apply = jax.jit(lambda rng: model.apply(params, memory, *_data(), LENGTHS, rng=rng))
    without = jax.jit(lambda: plain.apply(params, memory, *_data(), LENGTHS))
    _close(apply(None)[0], without()[0], rtol=1e-5)
    assert (apply(jax.random.key(1))[0] != apply(jax.random.key(2))[0]).any()
    assert (apply(jax.random.key(1))[0] == apply(jax.random.key(1))[0]).all()


def test_likelihood_in_chunks_is_that_of_all_tokens(monkeypatch):
    model = _small(**CLUSTERS, n_layer=1)
    params, memory = _params(model), _full_memory(model)

    @jax.jit
    def hidden_and_log_probs(params):
        hidden, _ = model.hidden(params, memory, _data()[0], LENGTHS)
        return hidden, model.log_probs(params, hidden)

    hidden, log_probs = hidden_and_log_probs(params)
    _close(jnp.exp(log_probs).sum(-1), np.ones((LANES, 6)), rtol=1e-5)
    expected = -np.take_along_axis(log_probs, np.asarray(_data()[1])[..., None], -1)[..., 0]
    for tokens in (1, 4 * LANES, 1000):
        monkeypatch.setattr("experiments.language_modelling.models.adaptive.CHUNK_TOKENS", tokens)
        nll = jax.jit(lambda params: model.nll(params, hidden, _data()[1]))
        _close(nll(params), expected, rtol=1e-5)


def test_kernels_are_used_through_one_product(monkeypatch):
    """A kernel that is no array, an array and a scale, passes through layers and scan alike."""

    @jax.tree_util.register_pytree_node_class
    class Scaled:
        def __init__(self, kernel, scale):
            self.kernel, self.scale = kernel, scale

        def tree_flatten(self):
            return (self.kernel, self.scale), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    def product(x, kernel):
        if isinstance(kernel, Scaled):
            return product(x, kernel.kernel) * kernel.scale
        return x @ kernel.astype(x.dtype)

    for module in ("layers", "adaptive"):
        monkeypatch.setattr(f"experiments.language_modelling.models.{module}.matmul", product)
    for scan in (False, True):
        model = _small(**CLUSTERS, scan=scan)
        params = _params(model)

        def wrapped(path, leaf):
            one = jnp.full(leaf.shape[:-2], 2.0)
            return Scaled(leaf / 2, one) if path[-1].key == "kernel" else leaf

        compact = jax.tree_util.tree_map_with_path(wrapped, params)
        plain = model.apply(params, _full_memory(model), *_data(), LENGTHS)[0]
        _close(model.apply(compact, _full_memory(model), *_data(), LENGTHS)[0], plain, rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cutoffs": (9, 5)}, "cutoffs=[9, 5]: must be ascending"),
        ({"cutoffs": (5, 5)}, "cutoffs=[5, 5]: must be ascending"),
        ({"cutoffs": (0, 5)}, "above 0"),
        ({"cutoffs": (5, 23)}, "below n_token=23"),
        ({"cutoffs": (2.5, 9)}, "n_token=23, whole numbers"),
        ({"cutoffs": ("a", "b")}, "n_token=23, whole numbers"),
        ({"tie_projs": ("x",)}, "tie_projs=['x']: must be True or False"),
        ({"d_embed": 3.5}, "d_embed=3.5: must be a whole number"),
        ({"d_embed": "x"}, "d_embed='x': must be a whole number"),
        ({"div_val": 4}, "leaves nothing of d_embed=8 for the last of 3 clusters"),
        ({"tie_projs": (True,) * 4}, "tie_projs has 4 entries: there are 3 clusters"),
        ({"d_model": 7}, "d_model=7: must be even"),
        ({"n_layer": 0}, "n_layer=0: must be a whole number of at least 1"),
        ({"n_head": 2.0}, "n_head=2.0: must be a whole number"),
        ({"dropout": 1.0}, "dropout=1.0: must be in [0, 1)"),
        ({"dtype": "float16"}, "dtype='float16': must be one of float32, bfloat16"),
    ],
)
def test_bad_settings(changed, message):
    with pytest.raises(UserError) as error:
        TransformerXLConfig(**{**SMALL, **CLUSTERS, **changed})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [{"target": 0}, {"memory": -1}, {"memory": 0, "same_length": True}, {"clamp": 2.5}],
    ids=str,
)
def test_bad_lengths(changed):
    with pytest.raises(UserError, match=r"^lengths\."):
        Lengths(**{"target": 3, "memory": 2, **changed})


def test_compact_embeddings_and_softmax_compute_what_the_dense_ones_do():
    """Every table, projection and bias of the embedding and the adaptive softmax."""
    model = _small(**CLUSTERS, n_layer=1)
    rng = np.random.default_rng(0)
    names, leaves, treedef = flatten_with_names(_params(model))
    compact, dense = [], []
    for name, leaf in zip(names, leaves, strict=True):
        compact.append(leaf)
        dense.append(leaf)
        if name.startswith(("embedding", "softmax")):
            theta = 0.5 * rng.normal(size=leaf.shape).astype(np.float32)
            units = rng.permutation(leaf.size).reshape(leaf.shape)
            forward, backward = (units < max(1, leaf.size * d) for d in (0.3, 0.6))
            compact[-1] = from_masks(theta, forward, backward, tk.Unstructured())
            dense[-1] = jnp.asarray(np.where(forward, theta, 0))
    compact, dense = map(treedef.unflatten, (compact, dense))

    @jax.jit
    def gradient(params):
        def loss(values):
            nll, _ = model.apply(
                with_values(params, values), _full_memory(model), *_data(), LENGTHS
            )
            return nll.mean()

        return jax.value_and_grad(loss)(values_of(params))

    (loss, found), (expected, of_dense) = gradient(compact), gradient(dense)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    found, kernels = treedef.flatten_up_to(found), treedef.flatten_up_to(compact)
    for name, one, kernel, other in zip(
        names, found, kernels, jax.tree.leaves(of_dense), strict=True
    ):
        if is_compact(kernel):
            other = np.ravel(other)[np.asarray(kernel.index)]
        np.testing.assert_allclose(one, other, atol=2e-5, err_msg=name)
