"""The mesh changes where things are, not what they are."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from toy_runs import config, sets

from experiments.config import resolve
from experiments.errors import UserError
from experiments.training import partition
from experiments.training.program import build

MESHES = {
    "8x1": {},
    "2x4": {"fsdp": 4},
    "1x2x4": {"fsdp": 2, "tensor": 4},
}


MESH = ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=4"]


def train(steps, devices=None, **sizes):
    overrides = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    run = build(config("80/60", *overrides), devices)
    state, data, losses = run.representation.init(), run.task.train_data(), []
    for _ in range(steps):
        state, sums = run.step(state, run.put(next(data)))
        losses.append(float(sums["loss"][0] / sums["loss"][1]))
    return run, state, losses


@pytest.fixture(scope="module")
def alone():
    return train(20, jax.devices()[:1])


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES.keys())
def test_same_run_on_other_devices(alone, sizes):
    run, state, losses = train(20, **sizes)
    assert run.mesh.size == 8
    np.testing.assert_allclose(losses, alone[2], atol=1e-5)
    assert losses[-1] < losses[0] / 2
    for one, other in zip(sets(alone[1]), sets(state), strict=True):
        np.testing.assert_array_equal(one, other)


def shard(array):
    shapes = {s.data.shape for s in array.addressable_shards}
    assert len(shapes) == 1
    return shapes.pop()


def test_shards():
    run, state, _ = train(1, fsdp=4)
    for tree in (
        state.params,
        run.representation.init().params,
        run.view(state.params, state.opt_state),
    ):
        assert shard(tree["in"]["kernel"]) == (16, 8)
        assert shard(tree["in"]["bias"]) == (8,)
        assert shard(tree["out"]["kernel"]) == (8, 4)
        assert shard(tree["out"]["bias"]) == (1,)
    assert shard(state.model_state["mean"]) == (16,)
    shaped_alike = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 32)]
    assert len(shaped_alike) == 2  # sets and momentum
    assert {shard(x) for x in shaped_alike} == {(16, 8)}
    batch = run.put(next(run.task.train_data()))
    assert shard(batch["x"]) == (4, 16)
    _, both, _ = train(1, fsdp=2, tensor=4)
    assert shard(both.params["in"]["kernel"]) == (8, 8)  # columns over tensor
    assert shard(both.params["in"]["bias"]) == (8,)
    assert shard(both.params["out"]["kernel"]) == (8, 2)  # rows over tensor
    assert shard(both.params["out"]["bias"]) == (2,)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), ()),
        ((6,), ("tensor",)),
        ((5,), (None,)),
        ((8,), ("fsdp",)),
        ((3, 3, 16, 32), (None, None, "tensor", "fsdp")),
        ((32, 16), ("fsdp", "tensor")),
        ((8, 8), ("tensor", "fsdp")),
        ((6, 10), (None, "tensor")),
        ((0, 5), (None, None)),
    ],
)
def test_rule(shape, expected):
    mesh = partition.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    assert partition.spec(shape, mesh) == P(*expected)


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((24, 64, 32), -1, (None, "fsdp", "tensor")),
        ((24, 32, 64), -2, (None, "tensor", "fsdp")),
        ((64, 32), None, ("fsdp", None)),
        ((6, 9), -1, (None, None)),  # 2 does not divide 9, and the other axis is not the rule's.
        ((8,), -1, ("tensor",)),
    ],
)
def test_rule_of_a_model(shape, axis, expected):
    mesh = partition.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    found = partition.spec(shape, mesh, partition.Split(shape, axis))
    assert found == P(*expected)


def test_models_split_blocks_between_their_two_products():
    """Columns into a block and rows out of it, tables by vocabulary; moments and sets alike."""
    run = build(resolve("configs/enwik8_small.py:90/80,smoke", MESH))
    abstract = run.representation.abstract()
    layer, state = abstract.params["layers"], abstract.opt_state
    names = ("query", "key", "value", "position", "output")
    attention = {name: layer["attention"][name]["kernel"].sharding.spec for name in names}
    output = attention.pop("output")
    assert set(attention.values()) == {P(None, "fsdp", "tensor")}
    assert output == P(None, "tensor", "fsdp")
    forward = layer["feed_forward"]
    assert forward["up"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    assert forward["up"]["bias"].sharding.spec == P("fsdp", "tensor")
    assert forward["down"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
    assert forward["down"]["bias"].sharding.spec == P(None, "fsdp")
    for leaf, places in (("up", P(None, "fsdp", "tensor")), ("down", P(None, "tensor", "fsdp"))):
        shape = forward[leaf]["kernel"].shape
        paths = jax.tree_util.tree_leaves_with_path(state)
        alike = [x for path, x in paths if x.shape == shape and leaf in str(path)]
        assert len(alike) == 3  # the sets and two moments
        assert {x.sharding.spec for x in alike} == {places}


def test_a_table_is_split_by_vocabulary_and_a_wide_kernel_by_output():
    run = build(resolve("configs/wikitext103_large.py:dense,smoke", MESH))
    params = run.representation.abstract().params
    assert params["embedding"]["table"]["0"].sharding.spec == P("tensor", "fsdp")
    assert params["softmax"]["bias"]["0"].sharding.spec == P("tensor")
    images = build(resolve("configs/cifar10_small.py:dense", MESH))
    params = images.representation.abstract().params
    assert params["stage3"]["block0"]["conv2"]["kernel"].sharding.spec[-1] == "tensor"
    assert "tensor" not in params["stage1"]["block0"]["conv2"]["kernel"].sharding.spec


def test_a_tensor_axis_that_splits_nothing_is_refused():
    for rules, message in (
        ([(".*", None)], "config.mesh.tensor: found 4; must be 1"),
        ([("in/.*", -1)], "tensor_axes: no rule has 'out/bias'"),
    ):
        mesh = partition.make_mesh({"data": 2, "fsdp": 1, "tensor": 4})
        params = build(config("80/60")).representation.abstract().params
        with pytest.raises(UserError, match=message):
            partition.splits(params, rules, mesh)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.fsdp=3"], "config.mesh: found data=-1 x fsdp=3 x tensor=1; must multiply to the 8"),
        (["mesh.data=4"], "config.mesh: found data=4 x"),
        (["mesh.fsdp=16"], "config.mesh: found"),
        (["batch_size=12"], "config.batch_size: found 12; must be a multiple of data * fsdp = 8"),
    ],
)
def test_sizes_that_do_not_fit(overrides, message):
    with pytest.raises(UserError) as error:
        build(config("80/60", *overrides))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "fits"), [((2, 1, 2), True), ((1, 2, 2), True), ((1, 1, 4), False), ((4, 1, 1), True)]
)
def test_processes_have_parts_of_a_batch_of_their_own(sizes, fits):
    """Two processes of two devices each, in their order."""
    devices = np.array([SimpleNamespace(process_index=i // 2) for i in range(4)]).reshape(sizes)
    mesh = SimpleNamespace(devices=devices, shape=dict(zip(partition.AXES, sizes, strict=True)))
    if fits:
        partition.check_processes(mesh)
    else:
        with pytest.raises(UserError, match="must be a multiple of the 2 processes"):
            partition.check_processes(mesh)


def test_tensor_axis_does_not_split_the_batch():
    run = build(config("80/60", "batch_size=4", "mesh.data=4", "mesh.tensor=2"))
    batch = run.put(next(run.task.train_data()))
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(1, 16)}
