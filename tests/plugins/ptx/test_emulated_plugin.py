"""libfna_plugin.so end to end without a GPU: TensorRT's calls in their order, its launches executed, outputs compared."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from shared_build import KERNEL_CACHE
from torch import Tensor

from fna.attention import nystrom_attention_reference
from fna.chebyshev import ChebyshevSteps
from fna.errors import CheckFailedError, MissingCapabilityError
from fna.focal import focal_attention
from fna.focal_keys import focal_keys
from fna.plugins.ptx.cases import TOLERANCES
from fna.plugins.ptx.driver import elf_size
from fna.plugins.ptx.emulated_plugin import (
    EmulatedGpu,
    emulate_attention,
    emulate_focal,
    emulate_sampling,
    emulated_plugin,
)
from fna.samplers.fps import farthest_points_reference

ATTENTION = ["landmark-fp16-s64-d64", "finish-fp16-s64", "output-fp16-s64-d64"]


@pytest.fixture(scope="module")
def plugin(table: Path, programs) -> Iterator[ProcessPoolExecutor]:
    """The library of the test table, on a GPU that takes sm_87's images."""
    with emulated_plugin(EmulatedGpu(programs.folder, table)) as pool:
        yield pool


def make_inputs(
    batch: int, heads: int, tokens: int, count: int, head_size: int, *, shared: bool = False
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens + count)
    query, key, value = (torch.randn(batch, heads, tokens, head_size, generator=generator).half() for _ in range(3))
    rows = 1 if shared else batch
    landmarks = torch.stack([torch.randperm(tokens, generator=generator)[:count] for _ in range(rows)]).int()
    return [query, key, value, landmarks, torch.rand(rows, count, generator=generator)]


def reference(inputs: list[Tensor], *, sink: bool = False, iterations: int = 6, exact_rows: bool = True) -> Tensor:
    query, key, value, landmarks, bias, *mask = inputs
    return nystrom_attention_reference(
        query.double(), key.double(), value.double(), landmarks, bias.double(), query.shape[-1] ** -0.5, iterations,
        exact_rows, mask[0] if mask else None, sink,
    )  # fmt: skip


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("sizes", "shared"), [((1, 2, 131, 64, 64), False), ((2, 2, 100, 33, 48), True), ((1, 1, 1, 1, 16), False)]
)
def test_attention_is_the_definition(plugin: ProcessPoolExecutor, sizes: tuple[int, ...], shared: bool) -> None:
    inputs = make_inputs(*sizes, shared=shared)
    scale = sizes[-1] ** -0.5
    emulated = plugin.submit(emulate_attention, inputs, scale=scale, exact_rows=True).result()
    assert emulated.launches == ATTENTION
    assert relative(emulated.out, reference(inputs)) < TOLERANCES["fp16"]


@pytest.mark.parametrize(("rows", "sink"), [(1, True), (2, False)])
def test_version_2_takes_a_key_mask(plugin: ProcessPoolExecutor, rows: int, sink: bool) -> None:
    inputs = make_inputs(2, 1, 131, 40, 64)
    inputs.append((torch.rand(rows, 131, generator=torch.Generator().manual_seed(0)) < 0.2).int())
    emulated = plugin.submit(emulate_attention, inputs, scale=0.125, exact_rows=True, iterations=3, sink=sink).result()
    assert emulated.launches == [*ATTENTION, *ATTENTION[2:] * sink]
    assert relative(emulated.out, reference(inputs, sink=sink, iterations=3)) < TOLERANCES["fp16"]


@pytest.mark.parametrize("masked", [False, True])
def test_version_3_takes_the_cheaper_core(plugin: ProcessPoolExecutor, masked: bool) -> None:
    inputs, steps = make_inputs(1, 2, 131, 60, 64), ChebyshevSteps(8, 0.05)
    inputs += [(torch.rand(1, 131, generator=torch.Generator().manual_seed(0)) < 0.2).int()] * masked
    emulated = plugin.submit(emulate_attention, inputs, scale=0.125, exact_rows=True, chebyshev=steps).result()
    assert emulated.launches == ["landmark_chebyshev-fp16-s64-d64", "finish_chebyshev-fp16-s64", ATTENTION[2]]
    query, key, value, landmarks, bias, *mask = inputs
    wanted = nystrom_attention_reference(
        query.double(), key.double(), value.double(), landmarks, bias.double(), 0.125, 6, True, mask[0] if mask else None,
        False, steps,
    )  # fmt: skip
    assert relative(emulated.out, wanted) < TOLERANCES["fp16"]


def test_one_plugin_after_another_in_one_process(plugin: ProcessPoolExecutor) -> None:
    for tokens in (70, 65):
        inputs = make_inputs(1, 1, tokens, 64, 64)
        emulated = plugin.submit(emulate_attention, inputs, scale=0.125, iterations=2).result()
        wanted = reference(inputs, iterations=2, exact_rows=False)
        assert relative(emulated.out, wanted) < TOLERANCES["fp16"]


@pytest.mark.parametrize(("batch", "masked"), [(1, False), (2, True)])
def test_focal_attention_is_the_definition(plugin: ProcessPoolExecutor, batch: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(batch)
    inputs = [torch.randn(batch, 2, 2 + 13 * 11, 64, generator=generator).half() for _ in range(3)]
    lists = focal_keys((13, 11), 2, 8, ((1, 0), (2, 2)))
    mask = (torch.rand(1, 2 + 13 * 11, generator=generator) < 0.2).int() if masked else None
    given = [*inputs, *lists.tensors(), *([] if mask is None else [mask])]
    emulated = plugin.submit(emulate_focal, given, scale=0.125, prefix_tokens=2, hot=9).result()
    assert emulated.launches == ["focal_hot-fp16-d64", "focal-fp16-d64"]
    wanted = focal_attention(
        *(tensor.double() for tensor in inputs), patches=(13, 11), prefix_tokens=2, tile=8, hot=9, key_mask=mask
    )
    assert relative(emulated.out, wanted) < TOLERANCES["fp16"]


def test_sampling_launches_once_a_landmark_and_is_the_twins(plugin: ProcessPoolExecutor) -> None:
    features = torch.randn(2, 1100, 32, generator=torch.Generator().manual_seed(3)).half()
    emulated = plugin.submit(emulate_sampling, features, 5).result()
    assert emulated.launches == ["fps_step-fp16-d16"] * 5
    assert torch.equal(emulated.out, farthest_points_reference(features, 5))


def test_a_kernel_that_is_not_in_the_table_is_refused_by_the_plugin(plugin: ProcessPoolExecutor) -> None:
    inputs = make_inputs(1, 1, 131, 100, 64)
    with pytest.raises(CheckFailedError, match="landmark-fp16-s128-d64"):
        plugin.submit(emulate_attention, inputs, scale=0.125).result()


def test_an_image_whose_ptx_is_not_kept_is_named(programs, table: Path, tmp_path: Path) -> None:
    (tmp_path / "ptx.json").write_text('{"kernels": []}')
    with (
        emulated_plugin(EmulatedGpu(programs.folder, tmp_path)) as pool,
        pytest.raises(MissingCapabilityError, match="no PTX"),
    ):
        pool.submit(emulate_attention, make_inputs(1, 1, 70, 64, 64), scale=0.125).result()


def test_cubins_tell_their_size(table: Path) -> None:
    cubins = list(KERNEL_CACHE.glob("*.cubin"))
    assert cubins
    assert all(elf_size(cubin.read_bytes()[:64]) == cubin.stat().st_size for cubin in cubins)
