"""Time the plugin's kernels, and whole models, on this machine's GPU: `python -m fna.validate.bench.kernels [--model]`.

Attention alone: the plugin (through its library, as TensorRT calls it), exact attention (the fastest of PyTorch's backends), FNA in
plain PyTorch, and the floor: query, key, value and output each moved once at the copy bandwidth measured here, plus one
launch. Whole models: DINOv2 small, base and large with random weights, exact against FNA.

Everything is timed as a CUDA graph: warm-up, then the median over rounds of several replays between two events, in one run.
Inputs are not flushed from the cache between replays, the same for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import fna
from fna.attention import NEWTON_SCHULZ_ITERATIONS, apply_newton_schulz
from fna.errors import FnaError, MissingCapabilityError
from fna.files import write_text
from fna.machine import describe_machine
from fna.plugins.host import PluginLibrary
from fna.samplers.grid import grid_landmarks

BATCHES = (1, 8)
HEADS = (6, 12)
TOKENS = (577, 1370, 4096, 8192, 16384)
LANDMARKS = (64, 128)
HEAD_SIZE = 64
RESOLUTIONS = (518, 1022, 1540)
MODELS = {"small": (384, 6, 12), "base": (768, 12, 12), "large": (1024, 16, 24)}  # channels, heads, blocks (DINOv2)
PATCH_SIZE = 14

TARGET_EXACT = {1370: 1.2, 4096: 5.0, 16384: 15.0}  # times as fast as exact attention, at B=1, H=12, S=64
TARGET_PLAIN = 5.0  # times as fast as plain-torch FNA, everywhere
TARGET_FLOOR = 2.0  # at most so many times the floor, from FLOOR_TOKENS on
FLOOR_TOKENS = 8192

ROUNDS, REPLAYS = 15, 20
COPY_BYTES = 512 * 2**20


@dataclass(frozen=True)
class AttentionRow:
    """Microseconds of one attention layer in fp16."""

    batch: int
    heads: int
    tokens: int
    landmarks: int
    plugin: float
    exact: float
    exact_backend: str
    plain: float
    floor: float

    def missed(self) -> list[str]:
        """The targets that this row misses, in words."""
        at = f"B={self.batch} H={self.heads} N={self.tokens} S={self.landmarks}"
        misses = []
        wanted = TARGET_EXACT.get(self.tokens) if (self.batch, self.heads, self.landmarks) == (1, 12, 64) else None
        if wanted is not None and self.exact / self.plugin < wanted:
            misses.append(f"{at}: {self.exact / self.plugin:.2f} times as fast as exact attention (target {wanted})")
        if self.plain / self.plugin < TARGET_PLAIN:
            misses.append(f"{at}: {self.plain / self.plugin:.2f} times as fast as plain FNA (target {TARGET_PLAIN})")
        if self.tokens >= FLOOR_TOKENS and self.plugin / self.floor > TARGET_FLOOR:
            misses.append(f"{at}: {self.plugin / self.floor:.2f} times the floor (target {TARGET_FLOOR})")
        return misses


@dataclass(frozen=True)
class ModelRow:
    """Milliseconds of one whole model in fp16."""

    model: str
    resolution: int
    tokens: int
    exact: float
    fna: float


def time_graph(run: Callable[[], object]) -> float:
    """Median microseconds of one `run`, captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(REPLAYS):
        graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(ROUNDS):
        start.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / REPLAYS)
    return statistics.median(times)


def plain_fna(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, scale: float) -> Tensor:
    """FNA as the paper's authors run it: PyTorch operators in the input type, Newton-Schulz in fp32, nothing fused."""
    index = landmarks.long()[:, None, :, None].expand(query.shape[0], query.shape[1], -1, query.shape[3])
    query_landmarks, key_landmarks = query.gather(2, index), key.gather(2, index)
    core = torch.softmax(scale * query_landmarks @ key_landmarks.mT, dim=-1, dtype=torch.float32)
    exact = torch.softmax(scale * query_landmarks @ key.mT, dim=-1) @ value
    mixed = apply_newton_schulz(core, exact.float(), NEWTON_SCHULZ_ITERATIONS)
    return torch.softmax(scale * query @ key_landmarks.mT, dim=-1) @ mixed.to(query.dtype)


def time_exact(query: Tensor, key: Tensor, value: Tensor) -> tuple[float, str]:
    """Microseconds of scaled_dot_product_attention by its fastest backend, and that backend's name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    times = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            with sdpa_kernel(backend):
                elapsed = time_graph(lambda: functional.scaled_dot_product_attention(query, key, value))
        except RuntimeError:
            continue  # not available for this GPU
        times.append((elapsed, backend.name.lower()))
    if not times:
        raise MissingCapabilityError("no fused backend of scaled_dot_product_attention runs on this GPU")
    return min(times)


def copy_bandwidth() -> float:
    """Bytes per microsecond, read and written, of a large copy on the device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / time_graph(lambda: target.copy_(source))


def launch_time() -> float:
    """Microseconds of a graph of one kernel that does next to nothing."""
    one = torch.zeros(1, device="cuda")
    return time_graph(lambda: one.add_(1))


def bench_attention(
    library: PluginLibrary, batch: int, heads: int, tokens: int, count: int, bandwidth: float, launch: float
) -> AttentionRow:
    """Time one size, B, H, N and S, in fp16."""
    query, key, value = (
        torch.randn(batch, heads, tokens, HEAD_SIZE, dtype=torch.float16, device="cuda") for _ in range(3)
    )
    landmarks = grid_landmarks(tokens, count, 1, device="cuda").contiguous()
    bias = torch.zeros(1, count, device="cuda")
    scale = HEAD_SIZE**-0.5
    plugin = library.attention(scale=scale, exact_rows=True)
    out = torch.empty_like(query)
    inputs = [query, key, value, landmarks, bias]
    workspace = torch.empty(plugin.workspace_bytes(inputs, out), dtype=torch.uint8, device="cuda")
    plugin.prepare(inputs, out)
    exact, backend = time_exact(query, key, value)
    return AttentionRow(
        batch, heads, tokens, count,
        plugin=time_graph(lambda: plugin.enqueue(inputs, out, workspace)),
        exact=exact,
        exact_backend=backend,
        plain=time_graph(lambda: plain_fna(query, key, value, landmarks, scale)),
        floor=4 * query.numel() * query.element_size() / bandwidth + launch,
    )  # fmt: skip


def bench_model(name: str, resolution: int, landmarks: int) -> ModelRow:
    """Time DINOv2 of one size with random weights, exact (scaled_dot_product_attention) and with FNA in every block."""
    from transformers import Dinov2Config, Dinov2Model

    from fna.plan import uniform_plan

    channels, heads, blocks = MODELS[name]
    config = Dinov2Config(
        hidden_size=channels, num_attention_heads=heads, num_hidden_layers=blocks, image_size=resolution,
        patch_size=PATCH_SIZE, attn_implementation="sdpa",
    )  # fmt: skip
    model = Dinov2Model(config).eval().to("cuda", torch.float16)
    pixels = torch.randn(1, 3, resolution, resolution, dtype=torch.float16, device="cuda")
    with torch.inference_mode():
        exact = time_graph(lambda: model(pixels).last_hidden_state) / 1000
        fna.patch(model, uniform_plan(blocks, landmarks=landmarks))
        nystrom = time_graph(lambda: model(pixels).last_hidden_state) / 1000
    return ModelRow(name, resolution, (resolution // PATCH_SIZE) ** 2 + 1, exact, nystrom)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, 1 when a target is missed, 2 for bad usage, 3 where there is no GPU or no library."""
    parser = argparse.ArgumentParser(
        prog="python -m fna.validate.bench.kernels", description="Time FNA on this machine's GPU."
    )
    parser.add_argument("--model", action="store_true", help="whole models instead of attention alone")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--landmarks", type=int, nargs="+", default=LANDMARKS)
    parser.add_argument("--resolution", type=int, nargs="+", default=RESOLUTIONS)
    parser.add_argument("--json", type=Path, default=None, help="write every number to this file")
    arguments = parser.parse_args(argv)
    try:
        if not torch.cuda.is_available():
            raise MissingCapabilityError("timing needs a CUDA device, and this machine has none")
        device = describe_machine()
        print(*(f"{name}: {value}" for name, value in device.items()), sep="\n")
        rows, missed = _run_models(arguments) if arguments.model else _run_attention(arguments)
    except FnaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json is not None:
        write_text(
            arguments.json, json.dumps({"device": device, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )
    for line in missed:
        print(f"missed: {line}")
    return 1 if missed else 0


def _run_attention(arguments: argparse.Namespace) -> tuple[list[AttentionRow], list[str]]:
    library = PluginLibrary()
    bandwidth, launch = copy_bandwidth(), launch_time()
    print(f"copy bandwidth {bandwidth / 1000:.0f} GB/s, one launch {launch:.1f} us; microseconds, fp16, D={HEAD_SIZE}")
    print(
        "  B  H      N   S   plugin    exact    plain    floor  exact/plugin plain/plugin plugin/floor  exact backend"
    )
    rows = []
    sizes = [(b, h, n, s) for b in BATCHES for h in HEADS for n in arguments.tokens for s in arguments.landmarks]
    for batch, heads, tokens, count in sizes:
        row = bench_attention(library, batch, heads, tokens, count, bandwidth, launch)
        rows.append(row)
        print(
            f"{row.batch:3}{row.heads:3}{row.tokens:7}{row.landmarks:4}{row.plugin:9.1f}{row.exact:9.1f}{row.plain:9.1f}"
            f"{row.floor:9.1f}{row.exact / row.plugin:14.2f}{row.plain / row.plugin:13.2f}{row.plugin / row.floor:13.2f}"
            f"  {row.exact_backend}",
            flush=True,
        )
    return rows, [line for row in rows for line in row.missed()]


def _run_models(arguments: argparse.Namespace) -> tuple[list[ModelRow], list[str]]:
    from fna.plugins.torch_ops import choose_backend

    landmarks = arguments.landmarks[0]
    print(
        f"DINOv2, random weights, fp16, batch 1, FNA in every block, S={landmarks}, kernels: {choose_backend()}; milliseconds"
    )
    print("model  resolution  tokens    exact      FNA  exact/FNA")
    rows = []
    for name in MODELS:
        for resolution in arguments.resolution:
            row = bench_model(name, resolution, landmarks)
            rows.append(row)
            print(
                f"{row.model:6}{row.resolution:11}{row.tokens:8}{row.exact:9.2f}{row.fna:9.2f}{row.exact / row.fna:11.2f}",
                flush=True,
            )
    return rows, []


if __name__ == "__main__":
    sys.exit(main())
