"""The stand-in CUDA driver of the plugin's tests, made to execute: what the library launches runs in the machine.

The stand-in takes the place of libcuda.so.1 for the whole process, so this belongs into a process of its own: `emulated_plugin.py`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fna.errors import CheckFailedError, MissingCapabilityError
from fna.plugins.ptx.images import PtxImage, PtxImages
from fna.plugins.ptx.kernel import Kernel
from fna.plugins.ptx.memory import GlobalMemory

_ELF = b"\x7fELF"
_ELF_HEADER_BYTES = 64
_ILLEGAL_ADDRESS = 700  # CUDA_ERROR_ILLEGAL_ADDRESS
_LAYOUT_TYPES: dict[str, Any] = {"p": ctypes.c_uint64, "i": ctypes.c_int32, "f": ctypes.c_float}
_TRITON_SCRATCH = "pp"
"""After a kernel's own arguments come Triton's two addresses of scratch, which are null."""

_LOAD = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_uint64, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


class MachineDriver:
    """A driver that plays a chip and executes launches in `memory`, which has to be set before."""

    def __init__(self, library: Path, images: PtxImages, sm: int, multiprocessors: int) -> None:
        """Load the stand-in (`fake/libcuda.so.1` of the plugin's build) into this process.

        Raises:
            MissingCapabilityError: it is not built.
        """
        if not library.exists():
            raise MissingCapabilityError(f"{library} is not built; run: fna plugin --checks")
        os.environ["FNA_FAKE_CUDA_SM"] = str(sm)
        os.environ["FNA_FAKE_CUDA_MULTIPROCESSORS"] = str(multiprocessors)
        self.memory: GlobalMemory | None = None
        self.launches: list[str] = []
        self._errors: list[Exception] = []
        self._images = images
        self._loaded: dict[int, PtxImage] = {}
        self._kernels: dict[tuple[str, int], Kernel] = {}
        # The loader finds it by its name from now on; the callbacks live as long as the driver.
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._callbacks = _LOAD(self._load), _LAUNCH(self._launch)
        self._library.fna_fake_cuda_execute(*self._callbacks)

    def raise_errors(self) -> None:
        """Raise what went wrong in a callback: C++ sees an error number only."""
        if self._errors:
            raise self._errors.pop(0)

    def _load(self, address: int) -> int:
        try:
            image = self._images.of_image(hashlib.sha256(read_image(address)).hexdigest())
        except Exception as error:  # an exception cannot pass through C++
            self._errors.append(error)
            return 0
        handle = len(self._loaded) + 1
        self._loaded[handle] = image
        return handle

    def _launch(
        self,
        handle: int,
        symbol: bytes,
        grid: Sequence[int],
        threads: int,
        shared: int,
        arguments: Sequence[int],
    ) -> int:
        try:
            image = self._loaded[handle]
            if self.memory is None or symbol.decode() != image.symbol or threads != 32 * image.warps:
                raise CheckFailedError(f"{image.variant} is launched as {symbol.decode()} with {threads} threads")
            kernel = self._kernel(image, shared)
            self.launches.append(image.variant)
            given = read_arguments(image.layout, arguments)
            kernel.launch(self.memory, (grid[0], grid[1], grid[2]), given)
        except Exception as error:  # an exception cannot pass through C++
            self._errors.append(error)
            return _ILLEGAL_ADDRESS
        return 0

    def _kernel(self, image: PtxImage, shared: int) -> Kernel:
        key = image.image_sha256, shared
        if key not in self._kernels:
            self._kernels[key] = Kernel(image.text(), shared, image.variant)
        return self._kernels[key]


def read_arguments(layout: str, addresses: Sequence[int]) -> list[int | float]:
    """What cuLaunchKernel is given, by the addresses of the values."""
    kinds = [_LAYOUT_TYPES[letter] for letter in layout + _TRITON_SCRATCH]
    return [kind.from_address(addresses[i]).value for i, kind in enumerate(kinds)]


def read_image(address: int) -> bytes:
    """A cubin or PTX as cuModuleLoadData gets it: by its address only."""
    if ctypes.string_at(address, len(_ELF)) != _ELF:
        return ctypes.string_at(address) + b"\0"
    return ctypes.string_at(address, elf_size(ctypes.string_at(address, _ELF_HEADER_BYTES)))


def elf_size(header: bytes) -> int:
    """The size of a 64-bit ELF file whose tables are its last parts, as in cubins (elf.5: Elf64_Ehdr)."""
    program_offset, section_offset = struct.unpack_from("<QQ", header, 32)
    program_size, program_count, section_size, section_count = struct.unpack_from("<HHHH", header, 54)
    return max(program_offset + program_size * program_count, section_offset + section_size * section_count)
