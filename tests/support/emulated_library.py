"""The plugin library in the PTX machine, with the interface that the GPU tests call: `FNA_EMULATE_GPU=1 pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor

from torch import Tensor

from fna.plugins.ptx.emulated_plugin import Emulated, emulate_attention, emulate_sampling


class EmulatedLibrary:
    """As `fna.plugins.host.PluginLibrary`, each call in the pool of `emulated_plugin`."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def attention(self, **options) -> EmulatedPlugin:
        return EmulatedPlugin(lambda inputs: self._pool.submit(emulate_attention, inputs, **options))

    masked_attention = attention

    def sampling(self, count: int) -> EmulatedPlugin:
        return EmulatedPlugin(lambda inputs: self._pool.submit(emulate_sampling, inputs[0], count))


class EmulatedPlugin:
    """As `fna.plugins.host.Plugin`; scratch is the emulation's own."""

    def __init__(self, submit: Callable[[list[Tensor]], Future[Emulated]]) -> None:
        self._submit = submit

    def workspace_bytes(self, inputs: list[Tensor], output: Tensor) -> int:
        return 0

    def prepare(self, inputs: list[Tensor], output: Tensor) -> None:
        pass

    def enqueue(self, inputs: list[Tensor], output: Tensor, workspace: Tensor) -> None:
        output.copy_(self._submit(inputs).result().out)
