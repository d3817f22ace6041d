"""The library and PyTorch's operators on a real GPU, against the plain-torch twin in fp64. `make test-gpu` runs these.

With FNA_EMULATE_GPU=1, and no GPU, the tests that need only the library's results run in the PTX machine, marked `emulated`:
`FNA_EMULATE_GPU=1 pytest -m emulated tests/plugins/test_gpu.py -k small`. All of them take hours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from emulated_library import EmulatedLibrary
from torch import Tensor

import fna
from fna.attention import nystrom_attention_reference
from fna.errors import MissingCapabilityError
from fna.plugins import torch_ops
from fna.plugins.host import PluginLibrary
from fna.plugins.ptx.emulated_plugin import emulated_plugin
from fna.samplers.fps import farthest_points_reference
from fna.samplers.norm_grid import norm_grid_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATED = DEVICE == "cpu" and os.environ.get("FNA_EMULATE_GPU") == "1"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not EMULATED, reason="this machine has no CUDA device"),
    *([pytest.mark.emulated] if EMULATED else []),
]
real = pytest.mark.skipif(EMULATED, reason="needs a GPU itself: graphs, streams, repetition or PyTorch's operators")

RELATIVE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = list(RELATIVE)


@dataclass(frozen=True)
class Call:
    """Inputs of one FastNystromAttention, in the plugin's order, and its scale."""

    inputs: list[Tensor]
    scale: float


@pytest.fixture(scope="module")
def library() -> Iterator[PluginLibrary | EmulatedLibrary]:
    """The library that `fna plugin` built; `make test-gpu` builds it first."""
    try:
        if EMULATED:
            with emulated_plugin() as pool:
                yield EmulatedLibrary(pool)
        else:
            yield PluginLibrary()
    except MissingCapabilityError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def make_call(
    dtype: torch.dtype, batch: int, heads: int, tokens: int, count: int, head_size: int, *, shared: bool = False
) -> Call:
    rows = 1 if shared else batch
    query, key, value = (torch.randn(batch, heads, tokens, head_size).to(DEVICE, dtype) for _ in range(3))
    landmarks = torch.stack([torch.randperm(tokens)[:count] for _ in range(rows)]).int().to(DEVICE)
    return Call([query, key, value, landmarks, torch.rand(rows, count).to(DEVICE)], head_size**-0.5)


def reference(call: Call, *, exact_rows: bool = True, iterations: int = 6) -> Tensor:
    query, key, value, landmarks, bias = call.inputs
    full = (tensor.double() for tensor in (query, key, value))
    return nystrom_attention_reference(*full, landmarks, bias.double(), call.scale, iterations, exact_rows)


def assert_close(found: Tensor, wanted: Tensor, relative: float) -> None:
    assert found.isfinite().all()
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    assert error < relative, f"relative error {error:.2e}, but at most {relative:.0e} is allowed"


def poisoned(size: int) -> Tensor:
    """Scratch or output in which every value is a NaN of its type, so that a read before a write shows."""
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)


def poisoned_like(tensor: Tensor) -> Tensor:
    return poisoned(tensor.numel() * tensor.element_size()).view(tensor.dtype).view(tensor.shape)


def run_plugin(library: PluginLibrary, call: Call, **options) -> Tensor:
    plugin = library.attention(scale=call.scale, **options)
    out = poisoned_like(call.inputs[0])
    workspace = poisoned(plugin.workspace_bytes(call.inputs, out))
    plugin.prepare(call.inputs, out)
    plugin.enqueue(call.inputs, out, workspace)
    synchronize()
    return out


def synchronize() -> None:
    if not EMULATED:
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("count", [1, 33, 64, 65, 128, 200, 256])
def test_every_type_head_size_and_landmark_count(library, dtype, head_size, count) -> None:
    sizes = (1, 2, 321) if EMULATED else (2, 3, 577)
    call = make_call(dtype, *sizes, count, head_size)
    assert_close(run_plugin(library, call, exact_rows=True), reference(call), RELATIVE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [33, 128, 256])
def test_small_and_odd_sizes(library, dtype, count) -> None:
    """Also what compute-sanitizer runs: every path once, small."""
    call = make_call(dtype, 1, 2, 261, count, 80)
    assert_close(run_plugin(library, call, exact_rows=True), reference(call), RELATIVE[dtype])


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [33, 128, 256])
def test_small_and_odd_sizes_with_masked_keys(library, dtype, count, rows, sink) -> None:
    call = make_call(dtype, 2, 2, 261, count, 80)
    mask = (torch.rand(rows, 261) < 0.2).int().to(DEVICE)
    query, key, value, landmarks, bias = call.inputs
    full = (tensor.double() for tensor in (query, key, value))
    wanted = nystrom_attention_reference(*full, landmarks, bias.double(), call.scale, 6, True, mask, sink)
    plugin = library.masked_attention(scale=call.scale, exact_rows=True, sink=sink)
    inputs, out = [*call.inputs, mask], poisoned_like(query)
    workspace = poisoned(plugin.workspace_bytes(inputs, out))
    plugin.prepare(inputs, out)
    plugin.enqueue(inputs, out, workspace)
    synchronize()
    assert_close(out, wanted, RELATIVE[dtype])
    if EMULATED:
        return
    found = torch_ops.attention_with_key_mask(query, key, value, landmarks, bias, mask, call.scale, 6, True, sink)
    assert_close(found, wanted, RELATIVE[dtype])
    plain = torch_ops.attention(query, key, value, landmarks, bias, call.scale, 6, True)
    none = torch.zeros_like(mask)
    assert torch.equal(
        torch_ops.attention_with_key_mask(query, key, value, landmarks, bias, none, call.scale, 6, True, sink), plain
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "channels"), [(130, 96), (1370, 100)])
def test_small_and_odd_sampling(library, dtype, tokens, channels) -> None:
    check_sampling(library, torch.randn(2, tokens, channels).to(DEVICE, dtype), 33)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 65, 127, 1370, *([] if EMULATED else [4097, 16384])])
def test_any_number_of_tokens(library, dtype, tokens) -> None:
    call = make_call(dtype, 1, 2, tokens, min(64, tokens), 64)
    assert_close(run_plugin(library, call, exact_rows=True), reference(call), RELATIVE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", range(1, 9))
@pytest.mark.parametrize("shared", [True, False])
def test_batches_of_1_to_8(library, dtype, batch, shared) -> None:
    call = make_call(dtype, batch, 2 if EMULATED else 6, 201, 48, 64, shared=shared)
    assert_close(run_plugin(library, call), reference(call, exact_rows=False), RELATIVE[dtype])


@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("count", [64, 128, 256])
def test_other_numbers_of_iterations(library, count, iterations) -> None:
    call = make_call(torch.float32, 1, 2, 300, count, 64)
    found = run_plugin(library, call, iterations=iterations)
    assert_close(found, reference(call, exact_rows=False, iterations=iterations), RELATIVE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicates_and_massive_norms(library, dtype) -> None:
    call = make_call(dtype, 1, 2, 600, 64, 64)
    for tensor in call.inputs[:3]:
        tensor[:, :, 300:] = tensor[:, :, :300]
    call.inputs[0][:, :, :3] *= 100
    call.inputs[1][:, :, :3] *= 100
    call.inputs[2][:, :, :3] = 3e4
    call.inputs[3][0, 32:] = call.inputs[3][0, :32]
    assert_close(run_plugin(library, call, exact_rows=True), reference(call), RELATIVE[dtype])


@real
@pytest.mark.parametrize("count", [64, 128, 256])
def test_runs_are_bitwise_repeatable(library, count) -> None:
    """A race would show as a difference sooner or later."""
    call = make_call(torch.float16, 2, 6, 1370, count, 64)
    first = run_plugin(library, call, exact_rows=True)
    for _ in range(20):
        assert torch.equal(run_plugin(library, call, exact_rows=True), first)


@real
@pytest.mark.parametrize("count", [64, 128, 256])
def test_a_captured_graph_replays_on_new_inputs(library, count) -> None:
    call = make_call(torch.float16, 1, 6, 1370, count, 64)
    plugin = library.attention(scale=call.scale, exact_rows=True)
    out = poisoned_like(call.inputs[0])
    workspace = poisoned(plugin.workspace_bytes(call.inputs, out))
    plugin.prepare(call.inputs, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plugin.enqueue(call.inputs, out, workspace)
    for _ in range(3):
        for tensor in call.inputs[:3]:
            tensor.copy_(torch.randn_like(tensor))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_close(out, reference(call), RELATIVE[torch.float16])


@real
def test_two_contexts_on_two_streams_at_once(library) -> None:
    calls = [make_call(torch.float16, 2, 6, 1370, count, 64) for count in (64, 128)]
    plugins = [library.attention(scale=call.scale, exact_rows=True) for call in calls]
    outs = [poisoned_like(call.inputs[0]) for call in calls]
    spaces = [poisoned(p.workspace_bytes(c.inputs, o)) for p, c, o in zip(plugins, calls, outs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for plugin, call, out in zip(plugins, calls, outs, strict=True):
        plugin.prepare(call.inputs, out)
    torch.cuda.synchronize()
    for _ in range(50):
        for plugin, call, out, space, stream in zip(plugins, calls, outs, spaces, streams, strict=True):
            with torch.cuda.stream(stream):
                plugin.enqueue(call.inputs, out, space)
    torch.cuda.synchronize()
    for call, out in zip(calls, outs, strict=True):
        assert_close(out, reference(call), RELATIVE[torch.float16])


def check_sampling(library: PluginLibrary, features: Tensor, count: int) -> None:
    plugin = library.sampling(count)
    landmarks = torch.full((features.shape[0], count), -1, dtype=torch.int32, device=DEVICE)
    workspace = poisoned(plugin.workspace_bytes([features], landmarks))
    plugin.prepare([features], landmarks)
    plugin.enqueue([features], landmarks, workspace)
    assert torch.equal(landmarks.cpu(), farthest_points_reference(features.cpu(), count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "channels"), [(64, 7), (257, 384), (1024, 64), *([] if EMULATED else [(1370, 384), (16384, 768)])]
)
def test_farthest_points_are_the_twins_exactly(library, dtype, tokens, channels) -> None:
    features = torch.randn(3, tokens, channels).to(DEVICE, dtype)
    features[:, tokens // 2 : tokens // 2 + 9] = features[:, :9]
    check_sampling(library, features, min(64, tokens))


@pytest.fixture(params=["table", "jit"])
def backend(request, monkeypatch) -> str:
    """Both ways in which PyTorch launches the kernels."""
    if EMULATED:
        pytest.skip("PyTorch's operators launch on a GPU")
    if request.param == "table" and torch_ops._table() is None:
        pytest.skip("no kernel table is built; run: fna plugin")
    monkeypatch.setattr(torch_ops, "choose_backend", lambda: request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [33, 128, 256])
def test_pytorchs_operator_runs_the_kernels(backend, dtype, count) -> None:
    call = make_call(dtype, 2, 3, 577, count, 64)
    query, key, value, landmarks, bias = call.inputs
    found = torch_ops.attention(query, key, value, landmarks, bias, call.scale, 6, True)
    assert_close(found, reference(call), RELATIVE[dtype])


def test_pytorchs_operator_takes_a_packed_projection(backend) -> None:
    packed = torch.randn(2, 577, 3, 6, 64, device=DEVICE, dtype=torch.float16)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    assert torch_ops.kernel_layout(query, key, value)[0] is query
    call = Call([query, key, value, torch.arange(0, 577, 9).int().to(DEVICE)[None], torch.zeros(1, 65).cuda()], 0.125)
    found = torch_ops.attention(query, key, value, call.inputs[3], None, 0.125, 6, True)
    assert_close(found, reference(call), RELATIVE[torch.float16])


def test_pytorchs_operator_is_found_captured_and_compiled(backend) -> None:
    query, key, value, landmarks, bias = make_call(torch.float16, 1, 6, 577, 64, 64).inputs

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fna.fast_nystrom_attention(q, k, v, landmarks, landmark_bias=bias, exact_rows=True) * 2

    eager = attend(query, key, value)
    assert torch.equal(torch.compile(attend, fullgraph=True)(query, key, value), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(query, key, value)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)


def test_pytorchs_sampling_is_the_twins_exactly(backend) -> None:
    features = torch.randn(2, 1370, 384, device=DEVICE, dtype=torch.float16)
    found = torch_ops.farthest_points(features, 64)
    assert torch.equal(found.cpu(), farthest_points_reference(features.cpu(), 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [257, 1370, 16384])
def test_pytorchs_norm_grid_is_the_twins_exactly(backend, dtype, tokens) -> None:
    features = torch.randn(2, tokens, 384, device=DEVICE).mul(torch.rand(2, tokens, 1, device=DEVICE)).to(dtype)
    found = torch_ops.norm_grid(features, 64, 1)
    assert torch.equal(found.cpu(), norm_grid_reference(features.cpu(), 64, 1))
