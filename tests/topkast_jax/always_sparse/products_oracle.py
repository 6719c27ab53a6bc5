"""Block and entry products in plain NumPy, from the masks: what the tests compare with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax import Block, Unstructured
from topkast_jax.always_sparse import CompactKernel, from_masks


@dataclasses.dataclass
class Case:
    """A dense leaf with its sets, and the compact kernel made of it."""

    dense: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    kernel: CompactKernel


def expand(units: np.ndarray, pattern: Block | Unstructured) -> np.ndarray:
    """Bool array over units -> bool array over entries."""
    if isinstance(pattern, Unstructured):
        return units
    return units.repeat(pattern.rows, axis=-2).repeat(pattern.cols, axis=-1)


def make_case(shape, pattern, forward_units, backward_units, seed=0, dtype=np.float32) -> Case:
    """Sets given as bool arrays over the grid of units."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal(shape).astype(dtype)
    forward, backward = expand(forward_units, pattern), expand(backward_units, pattern)
    kernel = jax.tree.map(jnp.asarray, from_masks(dense, forward, backward, pattern))
    return Case(dense, forward, backward, kernel)


def random_case(shape, pattern, a, b, seed=0, dtype=np.float32) -> Case:
    """`a` units forward and `b` backward, at random."""
    grid = pattern.grid(shape)
    order = np.random.default_rng(seed).permutation(int(np.prod(grid)))
    forward, backward = (np.isin(np.arange(order.size), order[:k]).reshape(grid) for k in (a, b))
    return make_case(shape, pattern, forward, backward, seed, dtype)


def products(case: Case, x, dy):
    """y, dx and the dense dW (straight through on all of B, zero outside) in float64."""
    x, dy = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    alpha = np.where(case.forward, np.asarray(case.dense, np.float64), 0)
    flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dw = np.where(case.backward, flat_x.T @ flat_dy, 0)
    return x @ alpha, dy @ alpha.T, dw


def assert_close(found, expected, tolerance):
    """Largest error relative to the largest expected entry; shapes equal."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    scale = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_array_less(np.abs(found - expected).max(initial=0) / scale, tolerance)


def for_a_gpu():
    """What Triton's kernels are lowered for where no GPU is; JAX 0.12 and later ask for it."""
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu))
