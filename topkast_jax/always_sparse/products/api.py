r"""One matrix product for dense and compact kernels.

    y = x·W and dx = dy·Wᵀ over the forward set A, dW over the backward set B

The gradient of B\A is straight through: those units get xᵀ·dy like the others, though y does not
depend on them. A layer calls `matmul` and never asks which kernel it holds.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from topkast_jax.always_sparse import fan_in
from topkast_jax.always_sparse.fan_in import FanInKernel
from topkast_jax.always_sparse.kernel import (
    CompactKernel,
    check_single,
    matrix_shape,
    with_tile,
)
from topkast_jax.always_sparse.products import (
    native_cpu,
    pallas_gpu,
    pallas_tpu,
    single_entries,
    tuned_json,
    tuning,
)
from topkast_jax.always_sparse.products.platforms import only_on
from topkast_jax.always_sparse.products.settings import Settings
from topkast_jax.always_sparse.products.xla import sums_in
from topkast_jax.errors import SparsityError
from topkast_jax.varying import varying_like

KERNELS: dict[str, tuple[str, ModuleType]] = {
    "pallas_tpu": ("tpu", pallas_tpu),
    "pallas_gpu": ("cuda", pallas_gpu),
    "native_cpu": ("cpu", native_cpu),
}
BACKENDS = ("xla", *KERNELS)
INTERPRETED = ("pallas_tpu", "pallas_gpu")
Backend = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Options:
    """How block products run.

    Attributes:
      backend: one of `BACKENDS`, which has to take the block and the platform; or several, of which
        the first that does is used; None: the platform's own kernels, then "xla".
      interpret: run the Pallas kernels in interpret mode, on any platform (tests).
      mesh: devices to split the first axis of x over, in a `shard_map` around each product; where
        they do not divide it, and where x has no other axis, each computes the whole product.
        Pallas kernels need it on more than one device (the compiler does not split them), and it
        sums dW once a layer in place of once a block.
      axes: the mesh axes that x is split over.
      tuned: the table of the kernels' settings; None: the package's (`tuning`).
    """

    backend: Backend = None
    interpret: bool = False
    mesh: Mesh | None = None
    axes: tuple[str, ...] = ()
    tuned: tuning.Table | None = None

    def __post_init__(self) -> None:
        if self.backend is not None and not isinstance(self.backend, str):
            object.__setattr__(self, "backend", tuple(self.backend))
        names = (self.backend,) if isinstance(self.backend, str) else self.backend
        if names is not None and (not names or not set(names) <= set(BACKENDS)):
            raise SparsityError(
                f"backend {self.backend!r}: must be one of {', '.join(BACKENDS)}, or several"
            )
        if self.interpret and self.backend not in INTERPRETED:
            raise SparsityError(
                f"interpret=True with backend {self.backend!r}: must be with one of "
                f"{', '.join(INTERPRETED)}"
            )
        strange = [axis for axis in self.axes if self.mesh is None or axis not in self.mesh.shape]
        if strange:
            found = "no mesh" if self.mesh is None else f"a mesh of {tuple(self.mesh.shape)}"
            raise SparsityError(f"axes {self.axes!r} with {found}: must be axes of the mesh")


_PLATFORM = Options()
_OPTIONS = contextvars.ContextVar("always_sparse_options", default=_PLATFORM)


@contextlib.contextmanager
def options(
    backend: Backend = None,
    *,
    interpret: bool = False,
    mesh: Mesh | None = None,
    axes: Sequence[str] = (),
    tuned: str | os.PathLike[str] | None = None,
) -> Iterator[None]:
    """A context that sets `Options` for every block product traced inside it.

    Options act when a function is traced. A function that is already compiled keeps those with
    which it was traced. A context inside another one replaces all options but `tuned`.

    Args:
      backend: one of `BACKENDS`, which must support the blocks and the platform; or several, of
        which the first that supports both is used; None: the platform's own kernels where they
        support the blocks, and "xla" otherwise.
      interpret: whether Pallas kernels run in interpret mode, on any platform (for tests). It needs
        "pallas_tpu" or "pallas_gpu" as the backend.
      mesh: the devices over which the first axis of x is split, with a `shard_map` around each
        product; needed for Pallas kernels on more than one device. None: no split.
      axes: names of the axes of `mesh` over which x is split. Where their size does not divide the
        first axis of x, each device computes the whole product.
      tuned: the file of a table of settings, read now (`tuned_json` describes its contents); None:
        the table of the enclosing context, or else the package's.

    Raises:
      SparsityError: no such backend, options that do not fit together, or no such table.
    """
    table = _OPTIONS.get().tuned if tuned is None else tuned_json.load(tuned)
    token = _OPTIONS.set(Options(backend, interpret, mesh, tuple(axes), table))
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def matmul(
    x: jax.Array, kernel: jax.Array | CompactKernel | FanInKernel, *, backend: Backend = None
) -> jax.Array:
    """x·W for a dense or a compact W.

    Args:
      x: `[..., K]`.
      kernel: `[K, N]`, or a compact kernel of that shape. With blocks no dense buffer is made
        anywhere. With single entries the dense tile is made for the moment it is used, except by
        "native_cpu" at low densities (`single_entries`). For a product of few tokens, a
        `FanInKernel` (`by_output`) makes none either.
      backend: one of `BACKENDS`, or several in the order in which they are tried, in place of what
        `options` or the platform gives. Those of Pallas are for blocks and leave single entries to
        the tile.

    Returns:
      `[..., N]` in the dtype that x and the kernel promote to.

    Raises:
      SparsityError: x does not fit, the kernel is a stack or no matrix, its blocks do not divide
        it, no such backend, or one that does not take these blocks, their type or this platform.
    """
    how = _OPTIONS.get()
    if backend is not None:
        how = dataclasses.replace(how, backend=backend)
    if isinstance(kernel, FanInKernel):
        return fan_in.product(jnp.asarray(x), kernel)
    if not isinstance(kernel, CompactKernel):
        return jnp.matmul(x, kernel)
    check_single(kernel)
    k, n = matrix_shape(kernel)
    x = jnp.asarray(x)
    if x.shape[-1:] != (k,):
        raise SparsityError(f"x of shape {x.shape} does not fit a kernel of shape {(k, n)}")
    if not kernel.pattern.unit_shape:
        return _entries(x, kernel, (k, n), how)
    kernel.pattern.grid((k, n))  # refuses blocks that do not divide the shape
    return _over_mesh(x, kernel, (k, n), how)


def _entries(
    x: jax.Array, kernel: CompactKernel, shape: tuple[int, int], how: Options
) -> jax.Array:
    """The product of a kernel of single entries: on a CPU from them, elsewhere from the tile."""
    if _first_of(how.backend) == "native_cpu":
        reason = _entries_refusal(x, kernel, how)
        alone = how.backend is not None and "xla" not in how.backend
        if reason is None:
            return single_entries.matmul(x, kernel, shape, how.backend if alone else None)
        if alone:
            raise SparsityError(f"backend {how.backend!r}: {reason}")
    return with_tile(lambda w, x: jnp.matmul(x, w.reshape(shape)), kernel, x)


def _first_of(backend: Backend) -> str:
    """Which of the backends that take single entries is tried first."""
    if backend is None:
        return "native_cpu"
    tried = (backend,) if isinstance(backend, str) else backend
    return next((name for name in tried if name in ("native_cpu", "xla")), "xla")


def _entries_refusal(x: jax.Array, kernel: CompactKernel, how: Options) -> str | None:
    """Why the entries of a kernel are not multiplied one by one, or None."""
    if (platform := tuning.target_device(how.mesh).platform) != "cpu":
        return f"it runs on cpu and this is {platform}"
    if how.mesh is not None and how.mesh.size > 1:
        return f"single entries must be on one device, found a mesh of {how.mesh.size}"
    if any(axis is not None for axis in jax.typeof(x).sharding.spec):
        return f"single entries must be on one device, found x of {jax.typeof(x).sharding}"
    dtype = jnp.result_type(x, kernel.values)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"products must be in float32, bfloat16 or float16, found {dtype}"
    return _refusal("native_cpu", (), dtype)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is fixed when a block product is traced."""

    k: int
    n: int
    forward: int
    block: tuple[int, int]
    backend: Backend
    interpret: bool
    tuned: tuning.Table
    device: Any


def _over_mesh(
    x: jax.Array, kernel: CompactKernel, shape: tuple[int, int], how: Options
) -> jax.Array:
    dtype = jnp.result_type(x, kernel.values)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise SparsityError(f"a product of {x.dtype} and {kernel.dtype} blocks: must be floating")
    arrays = jnp.asarray(x, dtype), jnp.asarray(kernel.values, dtype), jnp.asarray(kernel.index)
    rows, cols = kernel.pattern.unit_shape
    static = _Static(
        *shape,
        kernel.forward,
        (rows, cols),
        how.backend,
        how.interpret,
        how.tuned or tuned_json.package_table(),
        tuning.target_device(how.mesh),
    )
    product = functools.partial(_any_axes, static)
    if how.mesh is not None:
        parts = math.prod(how.mesh.shape[axis] for axis in how.axes)
        split = P(how.axes) if x.ndim > 1 and x.shape[0] % parts == 0 else P()
        return _split(product, how.mesh, frozenset(), split, how)(*arrays)
    spec, mesh = jax.typeof(arrays[0]).sharding.spec, jax.typeof(arrays[0]).sharding.mesh
    axes = frozenset(jax.tree.leaves(tuple(spec)))
    if not axes:
        return product(*arrays)
    if spec[-1] is not None:
        raise SparsityError(
            f"x of sharding {spec}: its last axis must be whole, blocks read all of it"
        )
    everywhere = NamedSharding(mesh, P())
    whole = [jax.sharding.reshard(array, everywhere) for array in arrays[1:]]
    return _split(product, mesh, axes, P(*spec[:-1]), how)(arrays[0], *whole)


def _split(
    product: Any, mesh: Mesh | AbstractMesh, axes: frozenset[str], split: P, how: Options
) -> Any:
    """The product on each device's part of x; over `axes` of the mesh, all if there are none."""
    # Interpreted kernels mix varying and unvarying values, which the check refuses.
    return jax.shard_map(
        product, mesh=mesh, in_specs=(split, P(), P()), out_specs=split,
        check_vma=not how.interpret, axis_names=axes,
    )  # fmt: skip


def _any_axes(static: _Static, x: jax.Array, values: jax.Array, index: jax.Array) -> jax.Array:
    values, index = varying_like((values, index), x)
    y_TxN = _block_matmul(static, x.reshape(-1, x.shape[-1]), values, index)
    return y_TxN.reshape(*x.shape[:-1], static.n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_matmul(
    static: _Static, x_TxK: jax.Array, values: jax.Array, index: jax.Array
) -> jax.Array:
    row, col = _places(static, index[: static.forward])
    return _run(static, "spmm", x_TxK, values, row, col)


def _block_matmul_fwd(
    static: _Static, x_TxK: jax.Array, values: jax.Array, index: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _block_matmul(static, x_TxK, values, index), (x_TxK, values, index)


def _block_matmul_bwd(
    static: _Static, saved: tuple[jax.Array, ...], dy_TxN: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_TxK, values, index = saved
    row, col = _places(static, index)
    a = static.forward
    dx_TxK = _run(static, "spmm_transposed", dy_TxN, values, col[:a], row[:a])
    dvalues = _run(static, "sddmm", x_TxK, dy_TxN, row, col)
    return dx_TxK, dvalues.astype(values.dtype), None


_block_matmul.defvjp(_block_matmul_fwd, _block_matmul_bwd)


def _places(static: _Static, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Block row and block column of each block."""
    across = static.n // static.block[1]
    return index // across, index % across


def _run(static: _Static, product: str, *arrays: jax.Array) -> jax.Array:
    """Calls a product of the backend asked for, or of the platform it is lowered for."""
    x, blocks = arrays[0], arrays[-1].shape[0]
    if x.shape[0] == 0 or blocks == 0:
        return _zeros(static, product, x, blocks)

    def of(backend: str) -> Any:
        settings = _settings(static, backend, product, x)
        shape, interpret = (static.k, static.n), static.interpret
        return tuning.bound(backend, product, static.block, shape, settings, interpret)

    def refusing_others(backend: str, platforms: tuple[str, ...]) -> Any:
        def guarded(*arrays: jax.Array) -> Any:
            last = only_on(arrays[-1], static.backend, platforms)
            return of(backend)(*arrays[:-1], last)

        return guarded

    if not isinstance(static.backend, str):
        tried = (*KERNELS, "xla") if static.backend is None else static.backend
        tried = tried[: tried.index("xla")] if "xla" in tried else tried
        found = [name for name in tried if not _refusal(name, static.block, x.dtype)]
        fitting = {KERNELS[name][0]: of(name) for name in found}
        ends = static.backend is None or "xla" in static.backend
        default = of("xla") if ends else refusing_others("xla", tuple(fitting))
        return lax.platform_dependent(*arrays, **fitting, default=default)
    if static.backend == "xla":
        return of("xla")(*arrays)
    if reason := _refusal(static.backend, static.block, x.dtype):
        raise SparsityError(f"backend {static.backend!r}: {reason}")
    if static.interpret:
        return of(static.backend)(*arrays)
    return refusing_others(static.backend, KERNELS[static.backend][:1])(*arrays)


def _zeros(static: _Static, product: str, x: jax.Array, blocks: int) -> jax.Array:
    """The result of a product without tokens or blocks, which no backend takes."""
    shape = {
        "spmm": (x.shape[0], static.n),
        "spmm_transposed": (x.shape[0], static.k),
        "sddmm": (blocks, *static.block),
    }[product]
    dtype = sums_in(x.dtype) if product == "sddmm" else x.dtype
    zeros: jax.Array = varying_like(jnp.zeros(shape, dtype), x)
    return zeros


def _refusal(backend: str, block: tuple[int, ...], dtype: jnp.dtype) -> str | None:
    """Why the kernels of a backend do not take blocks of a type, or None."""
    if sums_in(dtype) != jnp.float32:
        return f"products must be in float32 or a smaller type, found {dtype}"
    reason: str | None = KERNELS[backend][1].refuses(block)
    return reason


def _settings(static: _Static, backend: str, product: str, x: jax.Array) -> Settings:
    kind = tuning.device_kind(backend, static.device, static.interpret)
    if kind is None:
        return tuning.defaults(backend, product)
    key = tuning.Key(kind, backend, product, static.block, x.dtype.name, (static.k, static.n))
    return static.tuned.settings(key, x.shape[0])
