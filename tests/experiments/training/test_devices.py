"""The mesh changes where things are, not what they are."""

import jax
import numpy as np
import pytest
from toy_runs import config, sets

from experiments.errors import UserError
from experiments.training import partition
from experiments.training.program import build

MESHES = {
    "8x1": {},
    "2x4": {"fsdp": 4},
    "1x2x4": {"fsdp": 2, "tensor": 4},
}


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
    assert shard(both.params["in"]["kernel"]) == (4, 16)


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
    assert partition.spec(shape, mesh) == jax.sharding.PartitionSpec(*expected)


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


def test_tensor_axis_does_not_split_the_batch():
    run = build(config("80/60", "batch_size=4", "mesh.data=4", "mesh.tensor=2"))
    batch = run.put(next(run.task.train_data()))
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(1, 16)}
