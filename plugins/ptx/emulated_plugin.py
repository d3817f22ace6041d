"""The built plugin library on a machine without a GPU: TensorRT's calls, and the launches in the PTX machine.

The stand-in driver takes libcuda.so.1's place, so the library lives in a process of its own:

    with emulated_plugin() as pool:
        out = pool.submit(emulate_attention, [query, key, value, landmarks, bias], scale=0.125).result()
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import ChebyshevSteps
from fna.errors import CheckFailedError, MissingCapabilityError
from fna.plugins.built import library_folder, table_folder
from fna.plugins.host import Plugin, PluginLibrary
from fna.plugins.ptx.calls import bytes_of, make_memory
from fna.plugins.ptx.cases import PLAIN
from fna.plugins.ptx.driver import MachineDriver
from fna.plugins.ptx.images import load_images
from fna.plugins.ptx.memory import GlobalMemory

_PLAIN_INPUTS = 5
"""Query, key, value, landmarks and bias; a sixth is the key mask."""

_FOCAL_INPUTS = 7
"""Query, key, value, the lists and the places; an eighth is the key mask."""

_STAND_IN = "fake/libcuda.so.1"

ALIGNMENT = 256
"""Of TensorRT's tensors and workspace."""


@dataclass(frozen=True)
class EmulatedGpu:
    """Where the library and its table were built, and the GPU that the driver plays."""

    folder: Path = field(default_factory=library_folder)
    table: Path = field(default_factory=table_folder)
    sm: int = 87
    multiprocessors: int = 16


@dataclass(frozen=True)
class Emulated:
    """What a call gave and which kernels it launched."""

    out: Tensor
    launches: list[str]


class _Process:
    """The driver and the library of this process."""

    driver: MachineDriver
    library: PluginLibrary


def emulated_plugin(gpu: EmulatedGpu | None = None, workers: int = 1) -> ProcessPoolExecutor:
    """A pool of processes with the library and the machine in them.

    Raises:
        MissingCapabilityError: the library, the stand-in driver or the PTX is not built.
    """
    gpu = gpu or EmulatedGpu()
    for needed in (gpu.folder / "libfna_plugin.so", gpu.folder / _STAND_IN, gpu.table / "ptx.json"):
        if not needed.exists():
            raise MissingCapabilityError(
                f"{needed} is not built, and the plugin is emulated with it; run: fna plugin --checks"
            )
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start, initargs=(gpu,))


def _start(gpu: EmulatedGpu) -> None:
    torch.set_num_threads(1)
    _Process.driver = MachineDriver(gpu.folder / _STAND_IN, load_images(gpu.table), gpu.sm, gpu.multiprocessors)
    _Process.library = PluginLibrary(gpu.folder)


def emulate_attention(
    inputs: list[Tensor],
    *,
    scale: float,
    iterations: int = NEWTON_SCHULZ_ITERATIONS,
    exact_rows: bool = False,
    sink: bool = False,
    chebyshev: ChebyshevSteps | None = None,
) -> Emulated:
    """FastNystromAttention of query, key, value `[B, H, N, D]`, landmarks, bias and, where there is one, a key mask.

    It is of version 3 with `chebyshev`, else of version 2 with a key mask, else of version 1.

    Raises:
        CheckFailedError: the plugin failed, or a kernel did what none may do; names it.
    """
    library = _Process.library
    if chebyshev is not None:
        plugin = library.chebyshev_attention(
            scale=scale, steps=chebyshev.steps, low=chebyshev.low, exact_rows=exact_rows, sink=sink
        )
    elif len(inputs) > _PLAIN_INPUTS:
        plugin = library.masked_attention(scale=scale, iterations=iterations, exact_rows=exact_rows, sink=sink)
    else:
        plugin = library.attention(scale=scale, iterations=iterations, exact_rows=exact_rows)
    return _enqueue(plugin, inputs, torch.empty_like(inputs[0]))


def emulate_focal(
    inputs: list[Tensor],
    *,
    scale: float,
    prefix_tokens: int,
    hot: int,
) -> Emulated:
    """FocalAttention of query, key, value `[B, H, N, D]`, its lists, the places and, where there is one, a key mask.

    Raises:
        CheckFailedError: the plugin failed, or a kernel did what none may do; names it.
    """
    masked = len(inputs) > _FOCAL_INPUTS
    plugin = _Process.library.focal(scale=scale, prefix_tokens=prefix_tokens, hot=hot, masked=masked)
    return _enqueue(plugin, inputs, torch.empty_like(inputs[0]))


def emulate_sampling(features: Tensor, count: int) -> Emulated:
    """FarthestPointSampling of `[B, N, C]`; `out` is `[B, S]` int32."""
    out = torch.empty(features.shape[0], count, dtype=torch.int32)
    return _enqueue(_Process.library.sampling(count), [features], out)


def _enqueue(plugin: Plugin, inputs: list[Tensor], like: Tensor) -> Emulated:
    driver = _Process.driver
    driver.launches.clear()
    workspace_bytes = plugin.workspace_bytes(inputs, like)
    sizes = [tensor.numel() * tensor.element_size() for tensor in (*inputs, like)]
    memory = driver.memory = make_memory([*sizes, workspace_bytes], PLAIN)
    placed = [_place(memory, f"input {i}", tensor) for i, tensor in enumerate(inputs)]
    out = _view(memory, memory.allocate("output", sizes[-1], alignment=ALIGNMENT), like)
    workspace = _view(
        memory,
        memory.allocate("workspace", workspace_bytes, alignment=ALIGNMENT),
        torch.empty(workspace_bytes, dtype=torch.uint8),
    )
    try:
        plugin.prepare(placed, out)
        plugin.enqueue(placed, out, workspace)
    except CheckFailedError:
        driver.raise_errors()
        raise
    _check(memory, out)
    return Emulated(out.clone(), list(driver.launches))


def _place(memory: GlobalMemory, name: str, tensor: Tensor) -> Tensor:
    return _view(memory, memory.allocate(name, bytes_of(tensor), writable=False, alignment=ALIGNMENT), tensor)


def _view(memory: GlobalMemory, address: int, like: Tensor) -> Tensor:
    """The memory at an address as a tensor: no copy, so that its address is what the library passes on."""
    raw = torch.from_numpy(memory.bytes_at(address, like.numel() * like.element_size()))
    return raw.view(like.dtype).view(like.shape)


def _check(memory: GlobalMemory, out: Tensor) -> None:
    faults = memory.reports.faults
    if faults:
        raise CheckFailedError(f"{len(faults)} faults in the plugin's kernels, the first: {faults[0]}")
    if not memory.written(out.data_ptr(), out.numel() * out.element_size()):
        raise CheckFailedError("the plugin did not write all of its output")
