"""The GPU of this machine, asked through the CUDA driver: nothing but the standard library is needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS = 75, 76, 16  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as the driver says it.
        capability: CUDA compute capability times ten.
        memory_bytes: of the device.
        multiprocessors: streaming multiprocessors.
        cuda: the newest CUDA version that the driver serves, such as "12.6".
    """

    name: str
    capability: int
    memory_bytes: int
    multiprocessors: int
    cuda: str


class NoGpuError(Exception):
    """There is no GPU to be used; the text says why."""


def find_gpu() -> Gpu | None:
    """Return the first GPU, or None where there is none (or no driver)."""
    try:
        return read_gpu()
    except NoGpuError:
        return None


def read_gpu() -> Gpu:
    """Return the first GPU.

    Raises:
        NoGpuError: saying what is missing.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoGpuError("the CUDA driver (libcuda.so.1) is not on this machine") from None
    status = driver.cuInit(0)
    if status:
        raise NoGpuError(f"the CUDA driver does not start (cuInit says {_describe(driver, status)})")
    count, version, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise NoGpuError("the CUDA driver sees no GPU")
    _call(driver, "cuDriverGetVersion", ctypes.byref(version))
    _call(driver, "cuDeviceGet", ctypes.byref(device), 0)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _call(driver, "cuDeviceGetName", name, len(name), device)
    _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        capability=10 * _attribute(driver, device, _CAPABILITY_MAJOR) + _attribute(driver, device, _CAPABILITY_MINOR),
        memory_bytes=memory.value,
        multiprocessors=_attribute(driver, device, _MULTIPROCESSORS),
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def _attribute(driver: ctypes.CDLL, device: ctypes.c_int, number: int) -> int:
    value = ctypes.c_int()
    _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), number, device)
    return value.value


def _call(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    status = getattr(driver, name)(*arguments)
    if status:
        raise NoGpuError(f"the CUDA driver refuses {name} ({_describe(driver, status)})")


def _describe(driver: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(status, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()}, error {status}"
