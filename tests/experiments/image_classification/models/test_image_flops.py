"""ResNet-50's FLOPs against the table of the RigL paper, by way of the project's own config."""

import jax
import pytest

import topkast_jax as tk
from experiments.config import resolve
from experiments.task import make_task
from topkast_jax.rules import resolve as resolve_rules
from topkast_jax.statistics import LeafCounts

# RigL keeps the first convolution dense with uniform densities; ERK shares out over all kernels.
FIRST = {"uniform": [("stem/kernel", tk.Dense())], "erk": []}


@pytest.fixture(scope="module")
def resnet50():
    """Parameters' shapes and the FLOPs of one 224×224 image by leaf."""
    task = make_task(resolve("configs/imagenet_resnet50.py:dense", []))
    params, model_state = jax.eval_shape(task.init, jax.random.key(0))
    image = {
        "image": jax.ShapeDtypeStruct((1, 224, 224, 3), "uint8"),
        "label": jax.ShapeDtypeStruct((1,), "int32"),
        "weight": jax.ShapeDtypeStruct((1,), "float32"),
    }
    flops = tk.statistics.leaf_flops(
        lambda p, s, b: task.eval_step(p, s, b)[1], params, model_state, image
    )
    return params, flops


def fractions(resnet50, forward, backward, distribution):
    params, by_leaf = resnet50
    sparse = tk.Sparse(distribution=distribution)
    rules = [*FIRST[distribution], (".*/kernel", sparse), (".*", tk.Dense())]
    sizes = [p.size for p in jax.tree.leaves(params)]
    leaves = resolve_rules(params, rules, forward, backward, tk.Unstructured())
    counts = {
        path: LeafCounts(size, leaf.counts.forward, leaf.counts.backward, True)
        for (path, leaf), size in zip(leaves.items(), sizes, strict=True)
        if leaf is not None
    }  # fmt: skip
    return tk.statistics.flops(by_leaf, counts)


def test_dense_flops(resnet50):
    assert sum(resnet50[1].values()) == pytest.approx(8.2e9, rel=0.01)


@pytest.mark.parametrize(
    ("density", "distribution", "published"),
    [(0.2, "uniform", 0.23), (0.1, "uniform", 0.13), (0.2, "erk", 0.42), (0.1, "erk", 0.24)],
)
def test_inference_fraction(resnet50, density, distribution, published):
    flops = fractions(resnet50, density, density, distribution)
    assert flops.inference_fraction == pytest.approx(published, abs=0.01)


def test_training_fraction_is_two_forward_and_one_backward(resnet50):
    a = fractions(resnet50, 0.1, 0.1, "uniform").inference_fraction
    b = fractions(resnet50, 0.2, 0.2, "uniform").inference_fraction
    both = fractions(resnet50, 0.1, 0.2, "uniform")
    assert both.training_fraction == pytest.approx((2 * a + b) / 3)
