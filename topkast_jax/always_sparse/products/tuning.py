"""Which settings a block product runs with: measured on a device, looked up when it is traced.

`tuned.json` in this folder is the table of the package; `options(tuned=PATH)` takes another, and
scripts/tune_products.py writes them (`tuned_json` describes them). The settings of a product are

1. among the entries of its device kind, backend, product, block, dtype and kernel shape `[K, N]`,
   those of the number of tokens nearest in ratio, the smaller number of two that are as near;
2. without any such entry, the kernel's defaults. A shape never borrows from another shape.

The tokens are those of one device where several split x. The device kind is that of the mesh of
`options`, or of the abstract device to compile for, else that of JAX's default device; a kernel of
another platform than this device's has its defaults, as where a CPU host compiles for TPUs and no
mesh names them. Settings decide the speed alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import jax

from topkast_jax.always_sparse.products import native_cpu, pallas_gpu, pallas_tpu, xla
from topkast_jax.always_sparse.products.settings import Settings

PRODUCTS = ("spmm", "spmm_transposed", "sddmm")
"""x·W, dy·Wᵀ, and the blocks of xᵀ·dy."""
MODULES: Mapping[str, ModuleType] = {
    "xla": xla,
    "pallas_tpu": pallas_tpu,
    "pallas_gpu": pallas_gpu,
    "native_cpu": native_cpu,
}
_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu", "native_cpu": "cpu"}  # as devices name them


def defaults(backend: str, product: str) -> Settings:
    """The settings of a product without a table."""
    module = MODULES[backend]
    found: Settings = module.SDDMM if product == "sddmm" else module.SPMM
    return found


def bound(
    backend: str,
    product: str,
    block: tuple[int, int],
    shape: tuple[int, int],
    settings: Settings,
    interpret: bool = False,
) -> Callable[..., jax.Array]:
    """A product of a backend as a function of its arrays.

    Args:
      backend: a name in `MODULES`.
      product: one of `PRODUCTS`.
      block: rows and columns of a block.
      shape: K and N of the kernel.
      settings: of this backend's kernel.
      interpret: run a Pallas kernel in interpret mode.
    """
    module, (k, n) = MODULES[backend], shape
    function, arguments = {
        "spmm": (module.spmm, (n, False)),
        "spmm_transposed": (module.spmm, (k, True)),
        "sddmm": (module.sddmm, (block,)),
    }[product]
    extra = {"interpret": True} if interpret else {}
    return lambda *arrays: function(*arrays, *arguments, settings, **extra)


@dataclasses.dataclass(frozen=True)
class Key:
    """What settings are looked up by, in addition to the number of tokens.

    Attributes:
      device: `jax.Device.device_kind`.
      backend: a name in `MODULES`.
      product: one of `PRODUCTS`.
      block: rows and columns of a block.
      dtype: the name of the dtype of x and of the values.
      shape: K and N.
    """

    device: str
    backend: str
    product: str
    block: tuple[int, int]
    dtype: str
    shape: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
      key: what it is looked up by.
      tokens: the number of rows of x.
      settings: the fastest that were found.
      microseconds: the time that the product took with them; None if not said.
      default_microseconds: the same with the defaults.
    """

    key: Key
    tokens: int
    settings: Settings
    microseconds: float | None = None
    default_microseconds: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Entries, of which no two have the same key and number of tokens."""

    entries: tuple[Entry, ...] = ()

    @functools.cached_property
    def _by_key(self) -> dict[Key, list[Entry]]:
        found: dict[Key, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.key, []).append(entry)
        return found

    def settings(self, key: Key, tokens: int) -> Settings:
        """The settings of a product, by the rule at the top of this file."""
        entries = self._by_key.get(key)
        if not entries:
            return defaults(key.backend, key.product)
        tokens = max(1, tokens)  # x may be empty

        def distance(entry: Entry) -> tuple[float, int]:
            return max(entry.tokens, tokens) / min(entry.tokens, tokens), entry.tokens

        return min(entries, key=distance).settings

    def merged(self, entries: Iterable[Entry]) -> Table:
        """This table with the entries, each in place of the one of its key and tokens, if any."""
        by_place = {(e.key, e.tokens): e for e in (*self.entries, *entries)}
        return Table(tuple(by_place.values()))


def device_kind(backend: str, device: Any, interpret: bool) -> str | None:
    """The kind of a device if it runs the backend's kernels, else None.

    Args:
      backend: a name in `MODULES`.
      device: anything with `platform` and `device_kind`.
      interpret: the kernels are interpreted, which runs anywhere.
    """
    if not interpret and _PLATFORMS.get(backend, device.platform) != device.platform:
        return None
    return str(device.device_kind)


def target_device(mesh: jax.sharding.Mesh | None) -> Any:
    """A device that runs a product, or an abstract one, as far as is known when it is traced.

    Args:
      mesh: that of `options`.
    """
    if mesh is not None:
        return mesh.devices.flat[0]
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return abstract
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined, unused-ignore]
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.devices(chosen)[0]
