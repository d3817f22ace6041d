"""Load kernels of the table and launch them through the CUDA driver, as `plugins/src/cuda_driver.cpp` does in C++."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from fna.errors import MissingCapabilityError
from fna.plugins.launch_plan import KernelVariant
from fna.plugins.table.kernel_file import CompiledKernel
from fna.plugins.table.read import Table

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEFAULT_SHARED_LIMIT = 48 * 1024
_CTYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int32, "f": ctypes.c_float}


class Loader:
    """The kernels of a table for one device, loaded on first use. The device's context has to be current."""

    def __init__(self, table: Table, sm: int) -> None:
        self._table = table
        self._sm = sm
        self._loaded: dict[KernelVariant, tuple[ctypes.c_void_p, CompiledKernel]] = {}

    def get(self, variant: KernelVariant) -> tuple[ctypes.c_void_p, CompiledKernel]:
        """The function of a variant; its PTX where the chip has no image or the driver refuses it."""
        if variant not in self._loaded:
            self._loaded[variant] = self._load(variant)
        return self._loaded[variant]

    def launch(
        self, variant: KernelVariant, grid: tuple[int, int, int], arguments: list[int | float], stream: int
    ) -> None:
        """Launch on a stream (its address); addresses, integers and floats in the kernel's order."""
        function, kernel = self.get(variant)
        # After a kernel's own arguments Triton's interface has two addresses of scratch that none of these kernels uses.
        values = [
            _CTYPES[letter](value) for letter, value in zip(kernel.layout + "pp", [*arguments, 0, 0], strict=True)
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        _call(
            "cuLaunchKernel", function, *map(ctypes.c_uint, grid), ctypes.c_uint(32 * kernel.warps), ctypes.c_uint(1),
            ctypes.c_uint(1), ctypes.c_uint(kernel.shared), ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip

    def _load(self, variant: KernelVariant) -> tuple[ctypes.c_void_p, CompiledKernel]:
        failure: MissingCapabilityError | None = None
        for kernel in self._table.find(variant.name, self._sm):
            try:
                return self._load_image(kernel), kernel
            except MissingCapabilityError as error:
                failure = error
        raise failure or MissingCapabilityError(
            f"the kernel table has no {variant.name} for compute capability {self._sm / 10:.1f}; "
            f"rebuild it: fna plugin --sm {self._sm},0"
        )

    def _load_image(self, kernel: CompiledKernel) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(module), self._table.image(kernel))
        _call("cuModuleGetFunction", ctypes.byref(function), module, kernel.symbol.encode())
        if kernel.shared > _DEFAULT_SHARED_LIMIT:
            _call("cuFuncSetAttribute", function, ctypes.c_int32(_MAX_DYNAMIC_SHARED), ctypes.c_int32(kernel.shared))
        return function


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MissingCapabilityError("the CUDA driver (libcuda.so.1) is not on this machine") from error


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise MissingCapabilityError(
            f"{name} failed: {(text.value or b'unknown error').decode()} (CUDA error {status})"
        )
