"""Tables of kernel settings: lookup, files, and that settings never change a product."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from products_oracle import assert_close, products, random_case

from topkast_jax import Block, SparsityError
from topkast_jax.always_sparse import CompactKernel, matmul, options, to_dense
from topkast_jax.always_sparse.products import pallas_gpu, pallas_tpu, tuned_json, tuning, xla
from topkast_jax.always_sparse.products.tuning import PRODUCTS, Entry, Key, Table

KEY = Key("cpu", "xla", "spmm", (8, 8), "float32", (32, 48))


def write(path, entries):
    path.write_text(tuned_json.dumps(Table(tuple(entries))))


def entry(tokens, at_once, **key):
    return Entry(dataclasses.replace(KEY, **key), tokens, xla.SpmmSettings(at_once=at_once))


def run_products(kernel, x, dy):
    def run(x, values, index, dy):
        k = CompactKernel(values, index, kernel.shape, kernel.pattern, kernel.forward)
        y, vjp = jax.vjp(lambda x, v: matmul(x, k.with_values(v)), x, values)
        return y, *vjp(dy)

    y, dx, dvalues = jax.jit(run)(x, kernel.values, kernel.index, dy)
    return y, dx, to_dense(kernel.with_values(dvalues))


def drawn(data, kernel):
    """Settings of a kernel with any allowed value for each field."""
    values = {
        field.name: data.draw(st.sampled_from(field.metadata["allowed"]), field.name)
        for field in dataclasses.fields(kernel)
    }
    return kernel(**values)


@pytest.mark.parametrize(
    ("backend", "block"),
    [
        ("xla", (8, 16)),
        ("pallas_gpu", (64, 32)),
        ("pallas_gpu", (16, 256)),
        ("pallas_tpu", (128, 256)),
    ],
    ids=str,
)
# Every example compiles three kernels: a failure is not shrunk.
@settings(max_examples=3, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_any_allowed_settings_give_the_products(tmp_path_factory, backend, block, data):
    """Looked up in a table, of tokens that fill no tile."""
    shape = (2 * block[0], 3 * block[1])
    entries = [
        Entry(
            Key("cpu", backend, product, block, "float32", shape),
            40,
            drawn(data, type(tuning.defaults(backend, product))),
        )
        for product in PRODUCTS
    ]
    path = tmp_path_factory.mktemp("tuned") / "tuned.json"
    write(path, entries)
    case = random_case(shape, Block(*block), 3, 5)
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.standard_normal((19, f)), jnp.float32) for f in shape)
    with options(backend, interpret=backend != "xla", tuned=path):
        found = run_products(case.kernel, x, dy)
    for one, expected in zip(found, products(case, x, dy), strict=True):
        assert_close(one, expected, 1e-5)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_some_blocks_at_once_and_the_rest(monkeypatch, at_once):
    monkeypatch.setattr(xla, "SPMM", xla.SpmmSettings(at_once=at_once))
    monkeypatch.setattr(xla, "SDDMM", xla.SddmmSettings(at_once=at_once))
    case = random_case((16, 24), Block(8, 8), 3, 5)
    x, dy = jnp.ones((3, 16)), jnp.ones((3, 24))
    for one, expected in zip(run_products(case.kernel, x, dy), products(case, x, dy), strict=True):
        assert_close(one, expected, 1e-5)


@pytest.mark.parametrize(
    ("tokens", "at_once"),
    [(100, 10), (400, 40), (120, 10), (199, 10), (200, 10), (201, 40), (9000, 40), (0, 10)],
)
def test_the_nearest_number_of_tokens_in_ratio(tokens, at_once):
    table = Table((entry(400, 40), entry(100, 10), entry(5, 1, shape=(48, 32))))
    assert table.settings(KEY, tokens).at_once == at_once


@pytest.mark.parametrize(
    "other",
    [
        {"device": "TPU v4"},
        {"product": "spmm_transposed"},
        {"block": (8, 16)},
        {"dtype": "bfloat16"},
        {"shape": (32, 96)},
    ],
    ids=str,
)
def test_nothing_is_borrowed_from_another_place(other):
    table = Table((entry(100, 10),))
    assert table.settings(dataclasses.replace(KEY, **other), 100) == xla.SPMM


class Seen:
    """The settings with which each product of a module is called."""

    def __init__(self, monkeypatch, module):
        self.settings = {}
        for name in ("spmm", "sddmm"):
            monkeypatch.setattr(module, name, self._spy(name, getattr(module, name)))

    def _spy(self, name, function):
        def spy(*args, **kwargs):
            (found,) = (arg for arg in args if isinstance(arg, tuning.Settings))
            transposed = name == "spmm" and args[5]
            self.settings[f"{name}_transposed" if transposed else name] = found
            return function(*args, **kwargs)

        return spy


def test_each_product_runs_with_its_own_settings(tmp_path, monkeypatch):
    """Also where options without a table stand inside those with one, as the trainer's do."""
    seen = Seen(monkeypatch, xla)
    kernel = random_case((32, 48), Block(8, 8), 3, 5).kernel
    path = tmp_path / "tuned.json"
    chosen = {
        "spmm": xla.SpmmSettings(at_once=1),
        "spmm_transposed": xla.SpmmSettings(at_once=2),
        "sddmm": xla.SddmmSettings(at_once=3),
    }
    entries = [
        Entry(dataclasses.replace(KEY, product=name), 7, each) for name, each in chosen.items()
    ]
    write(path, entries)
    arrays = kernel, jnp.ones((7, 32)), jnp.ones((7, 48))
    with options(tuned=path), options("xla"):
        run_products(*arrays)
    assert seen.settings == chosen
    run_products(*arrays)
    assert seen.settings == {"spmm": xla.SPMM, "spmm_transposed": xla.SPMM, "sddmm": xla.SDDMM}


def device(platform, kind):
    return SimpleNamespace(platform=platform, device_kind=kind)


@pytest.mark.parametrize(
    ("backend", "platform", "interpret", "found"),
    [
        ("xla", "cpu", False, "kind"),
        ("xla", "tpu", False, "kind"),
        ("pallas_gpu", "gpu", False, "kind"),
        ("pallas_tpu", "tpu", False, "kind"),
        ("pallas_tpu", "cpu", False, None),  # A CPU host compiles for TPUs.
        ("pallas_gpu", "tpu", False, None),
        ("pallas_gpu", "cpu", True, "kind"),
    ],
)
def test_a_device_counts_where_it_runs_the_kernels(backend, platform, interpret, found):
    assert tuning.device_kind(backend, device(platform, "kind"), interpret) == found


def test_the_device_is_that_of_the_mesh(monkeypatch):
    mesh = SimpleNamespace(devices=np.array([[device("tpu", "TPU v4")]]))
    assert tuning.target_device(mesh).device_kind == "TPU v4"
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    abstract = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(abstract):
        assert tuning.target_device(None).device_kind == "NVIDIA H100"
    assert tuning.target_device(None) == jax.devices()[0]
    with jax.default_device(jax.devices()[1]):
        assert tuning.target_device(None) == jax.devices()[1]


@pytest.mark.parametrize(("kind", "expected"), [("NVIDIA H100", 4), ("NVIDIA A100", 8)])
def test_compiling_for_a_device_that_is_not_here(tmp_path, monkeypatch, kind, expected):
    seen = Seen(monkeypatch, pallas_gpu)
    path = tmp_path / "tuned.json"
    key = Key("NVIDIA H100", "pallas_gpu", "spmm", (16, 16), "float32", (64, 64))
    write(path, [Entry(key, 8, pallas_gpu.SpmmSettings(num_warps=4))])
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    kernel = random_case((64, 64), Block(16, 16), 3, 5).kernel
    with (
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)),
        options(tuned=path),
    ):
        jax.make_jaxpr(matmul)(jnp.ones((8, 64)), kernel)
    assert seen.settings["spmm"].num_warps == expected


def test_a_table_keeps_its_other_entries(tmp_path):
    path = tmp_path / "tuned.json"
    first, other = entry(100, 10), entry(100, 11, device="TPU v4")
    faster = dataclasses.replace(entry(100, 12), microseconds=1.5, default_microseconds=2.0)
    third = entry(200, 13)
    write(path, Table((first, other)).merged([faster, third]).entries)
    assert set(tuned_json.load(path).entries) == {faster, other, third}
    assert len(path.read_text().splitlines()) == 5  # One line an entry, for reviews.


def test_the_package_has_a_table():
    assert isinstance(tuned_json.package_table(), Table)


RIGHT = tuned_json._fields(entry(100, 10))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"devise": "cpu"}, "devise: no such field; must be device, backend"),
        ({"device": ""}, 'device: found ""; must be a device kind'),
        ({"device": None}, "device: found null"),
        ({"backend": "cuda"}, 'backend: found "cuda"; must be one of xla, pallas_tpu'),
        ({"backend": ["xla"]}, 'backend: found ["xla"]'),
        ({"product": "gemm"}, 'product: found "gemm"; must be one of spmm, spmm_transposed'),
        ({"block": [8]}, "block: found [8]; must be two integers above 0"),
        ({"block": [8, 0]}, "block: found [8, 0]"),
        ({"dtype": "int32"}, 'dtype: found "int32"; must be the name of a floating dtype'),
        ({"dtype": "float33"}, 'dtype: found "float33"'),
        ({"shape": "32x48"}, 'shape: found "32x48"'),
        ({"tokens": True}, "tokens: found true; must be an integer above 0"),
        ({"tokens": 0}, "tokens: found 0"),
        ({"settings": []}, "settings: found []; must be an object"),
        ({"settings": {"stages": 2}}, "stages: no such setting; must be one of at_once"),
        ({"settings": {"at_once": 0}}, "at_once: found 0; must be an integer from 1 to 256"),
        ({"settings": {"at_once": 2.0}}, "at_once: found 2.0"),
        ({"settings": {"at_once": True}}, "at_once: found True"),
        ({"microseconds": -1}, "microseconds: found -1; must be a number above 0"),
        (
            {"backend": "pallas_gpu", "settings": {"tokens": 100}},
            "tokens: found 100; must be one of 16, 32, 64",
        ),
        (
            {"backend": "pallas_tpu", "settings": {"part": 100}},
            "part: found 100; must be an integer from 128 to 1024 in steps of 128",
        ),
    ],
    ids=str,
)
def test_a_wrong_entry_is_one_line(tmp_path, changed, told):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"entries": [RIGHT, {**RIGHT, "tokens": 200, **changed}]}))
    with pytest.raises(SparsityError) as error, options(tuned=path):
        pass
    assert str(error.value).startswith(f"tuned table {path}, entry 1: {told}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("{", "found no JSON"),
        ("[]", 'found []; must be an object with the list "entries"'),
        ('{"entries": {}}', 'must be an object with the list "entries"'),
        ('{"entries": [], "version": 1}', 'must be an object with the list "entries"'),
        ('{"entries": [3]}', "entry 0: found 3; must be an object"),
        ('{"entries": [{}]}', "entry 0: device: found nothing; must be a device kind"),
        (json.dumps({"entries": [RIGHT, RIGHT]}), "entry 1: found twice"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(tmp_path, text, told):
    path = tmp_path / "tuned.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SparsityError) as error:
        tuned_json.load(path)
    assert str(error.value).startswith(f"tuned table {path}")
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_are_worth_trying_and_what_is_tried_is_allowed():
    for module in (xla, pallas_gpu, pallas_tpu):
        for default in (module.SPMM, module.SDDMM):
            for field in dataclasses.fields(default):
                assert all(v in field.metadata["allowed"] for v in field.metadata["tried"])
                assert field.default in field.metadata["tried"]
                values = [getattr(s, field.name) for s in default.varied(field.name)]
                assert sorted([*values, field.default]) == sorted(field.metadata["tried"])
