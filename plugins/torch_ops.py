"""The same kernels under PyTorch: `fna::attention`, `fna::focal_attention` and `fna::farthest_point_sampling` on CUDA tensors.

`register()` gives the operators a CUDA kernel: from the built table where there is one, else through Triton's just-in-time
compiler, else none (then the plain-torch twin runs). `fna` finds it through the entry point group `fna.cuda_kernels` when the
first CUDA tensor arrives, so nothing has to be imported.

Under CUDA graphs: kernels are loaded at a shape's first call, so run once before capturing, as PyTorch itself asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fna.attention import nystrom_attention_reference
from fna.chebyshev import ChebyshevSteps, chebyshev_from
from fna.focal import focal_attention_reference
from fna.plugins.focal_plan import FOCAL_ROWS, FocalShape, focal_plan
from fna.plugins.launch_plan import (
    HEAD_SIZE_STEP,
    MAX_GRID_Y,
    MAX_HEAD_SIZE,
    MAX_HOT,
    MAX_ITERATIONS,
    MAX_LANDMARKS,
    NORM_GRID_TOKENS,
    POINTER_ALIGNMENT,
    AttentionShape,
    Dtype,
    LaunchPlan,
    Strides,
    attention_plan,
)
from fna.plugins.sampling_plan import norm_grid_plan, sampling_plan
from fna.plugins.table.chips import OLDEST_CHIP
from fna.plugins.table.read import Table, find_table
from fna.samplers.common.roles import norm_grid_count
from fna.samplers.fps import farthest_points_reference
from fna.samplers.norm_grid import norm_grid_reference

DTYPE_NAMES: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}

Run = Callable[[LaunchPlan, dict[str, Tensor]], None]


def register() -> bool:
    """Register the CUDA kernels with `fna`'s operators, and return True; False where only the plain-torch twin can run."""
    if choose_backend() == "twin":
        return False
    torch.library.register_kernel("fna::attention", "cuda", attention)
    torch.library.register_kernel("fna::attention_with_key_mask", "cuda", attention_with_key_mask)
    torch.library.register_kernel("fna::focal_attention", "cuda", focal_attention)
    torch.library.register_kernel("fna::farthest_point_sampling", "cuda", farthest_points)
    torch.library.register_kernel("fna::norm_grid_landmarks", "cuda", norm_grid)
    return True


@functools.cache
def choose_backend() -> str:
    """`table` where one is built, else `jit` where Triton is installed, else `twin`; also `twin` before compute capability 8.0."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < divmod(OLDEST_CHIP, 10):
        return "twin"
    if _table() is not None:
        return "table"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "twin"
    return "jit"


def attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S], int32
    landmark_bias: Tensor | None,  # [B, S] or [1, S]
    scale: float,
    iterations: int,
    exact_rows: bool,
    steps: int = 0,
    low: float = 0.0,
) -> Tensor:  # [B, H, N, D]
    """CUDA kernel of `fna::attention`; sizes and types that the kernels do not take run as the plain-torch twin."""
    return attention_with_key_mask(
        query, key, value, landmarks, landmark_bias, None, scale, iterations, exact_rows, False, steps, low
    )


def attention_with_key_mask(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S], int32
    landmark_bias: Tensor | None,  # [B, S] or [1, S]
    key_mask: Tensor | None,  # [B, N] or [1, N], int32
    scale: float,
    iterations: int,
    exact_rows: bool,
    sink: bool,
    steps: int = 0,
    low: float = 0.0,
) -> Tensor:  # [B, H, N, D]
    """CUDA kernel of `fna::attention_with_key_mask`."""
    core = chebyshev_from(steps, low)
    if not covers(query, landmarks, iterations):
        return nystrom_attention_reference(
            query, key, value, landmarks, landmark_bias, scale, iterations, exact_rows, key_mask, sink, core
        )
    query, key, value = kernel_layout(query, key, value)
    landmarks = landmarks.contiguous()
    if landmark_bias is None:
        bias = torch.zeros(1, landmarks.shape[1], dtype=torch.float32, device=query.device)
    else:
        bias = landmark_bias.to(torch.float32).contiguous()
    shape = attention_shape(query, landmarks, bias, key_mask)
    plan = _cached_attention_plan(
        shape, scale, iterations, exact_rows, multiprocessors(query.device), Strides(*query.stride()[:3]), sink,
        core,
    )  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # Without a mask the kernels read none, but need an address.
    mask = landmarks if key_mask is None else key_mask.contiguous()
    tensors = {"query": query, "key": key, "value": value, "landmarks": landmarks, "bias": bias, "key_mask": mask}
    run_plan(plan, {**tensors, "out": out})
    return out


def attention_shape(
    query: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S]
    bias: Tensor,  # [B, S] or [1, S]
    key_mask: Tensor | None,  # [B, N] or [1, N]
) -> AttentionShape:
    """Return the sizes of one call, as a plan wants them."""
    batch, heads, tokens, head_size = query.shape
    return AttentionShape(
        DTYPE_NAMES[query.dtype], batch, heads, tokens, head_size, landmarks.shape[1],
        shared_landmarks=landmarks.shape[0] == 1, shared_bias=bias.shape[0] == 1,
        masked=key_mask is not None, shared_mask=key_mask is not None and key_mask.shape[0] == 1,
    )  # fmt: skip


def focal_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    tile_queries: Tensor,  # [T, Q], int32
    tile_keys: Tensor,  # [T, K], int32
    tile_bias: Tensor,  # [T, K], fp32
    places: Tensor,  # [N - prefix], int32
    key_mask: Tensor | None,  # [B, N] or [1, N], int32
    prefix_tokens: int,
    hot: int,
    scale: float,
) -> Tensor:  # [B, H, N, D]
    """CUDA kernel of `fna::focal_attention`; sizes and types that the kernels do not take run as the plain-torch twin."""
    if not covers_focal(query, tile_queries, prefix_tokens, hot):
        return focal_attention_reference(
            query, key, value, tile_queries, tile_keys, tile_bias, places, key_mask, prefix_tokens, hot, scale
        )
    query, key, value = kernel_layout(query, key, value)
    plan = _cached_focal_plan(
        focal_shape(query, tile_queries, tile_keys, key_mask), prefix_tokens, hot, scale, multiprocessors(query.device),
        Strides(*query.stride()[:3]),
    )  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lists = {
        "tile_queries": tile_queries.contiguous(),
        "tile_keys": tile_keys.contiguous(),
        "tile_bias": tile_bias.contiguous(),
    }
    mask = lists["tile_keys"] if key_mask is None else key_mask.contiguous()
    run_plan(plan, {"query": query, "key": key, "value": value, **lists, "key_mask": mask, "out": out})
    return out


def focal_shape(
    query: Tensor,  # [B, H, N, D]
    tile_queries: Tensor,  # [T, Q]
    tile_keys: Tensor,  # [T, K]
    key_mask: Tensor | None,  # [B, N] or [1, N]
) -> FocalShape:
    """Return the sizes of one call of focal attention, as a plan wants them."""
    batch, heads, tokens, head_size = query.shape
    tiles, tile_rows = tile_queries.shape
    return FocalShape(
        DTYPE_NAMES[query.dtype], batch, heads, tokens, head_size, tiles, tile_rows, tile_keys.shape[1],
        masked=key_mask is not None, shared_mask=key_mask is not None and key_mask.shape[0] == 1,
    )  # fmt: skip


def covers_focal(query: Tensor, tile_queries: Tensor, prefix_tokens: int, hot: int) -> bool:
    """Whether the kernels take this call of focal attention."""
    programs = prefix_tokens + tile_queries.shape[0] * -(-tile_queries.shape[1] // FOCAL_ROWS)
    return _covers_sizes(query) and hot <= MAX_HOT and programs <= MAX_GRID_Y


def farthest_points(features: Tensor, num_landmarks: int) -> Tensor:  # [B, N, C] -> [B, S] int32
    """CUDA kernel of `fna::farthest_point_sampling`."""
    if features.dtype not in DTYPE_NAMES or features.shape[0] > MAX_GRID_Y:
        return farthest_points_reference(features, num_landmarks)
    features = _aligned(features.contiguous())
    batch, tokens, channels = features.shape
    plan = sampling_plan(DTYPE_NAMES[features.dtype], batch, tokens, channels, num_landmarks)
    landmarks = torch.empty(features.shape[0], num_landmarks, dtype=torch.int32, device=features.device)
    run_plan(plan, {"features": features, "landmarks": landmarks})
    return landmarks


def norm_grid(features: Tensor, num_landmarks: int, prefix_tokens: int) -> Tensor:  # [B, N, C] -> [B, S] int32
    """CUDA kernel of `fna::norm_grid_landmarks`."""
    batch, tokens, channels = features.shape
    prefix = min(prefix_tokens, num_landmarks)
    by_norm = norm_grid_count(num_landmarks, prefix)
    sizes = 0 < batch <= MAX_GRID_Y and 1 <= num_landmarks <= min(MAX_LANDMARKS, tokens) and tokens <= NORM_GRID_TOKENS
    if features.dtype not in DTYPE_NAMES or not sizes:
        return norm_grid_reference(features, num_landmarks, prefix_tokens)
    features = _aligned(features.contiguous())
    plan = norm_grid_plan(
        DTYPE_NAMES[features.dtype], batch, tokens, channels, num_landmarks, prefix=prefix, by_norm=by_norm
    )
    landmarks = torch.empty(batch, num_landmarks, dtype=torch.int32, device=features.device)
    run_plan(plan, {"features": features, "landmarks": landmarks})
    return landmarks


def covers(query: Tensor, landmarks: Tensor, iterations: int) -> bool:
    """Whether the kernels take this call."""
    count = 1 <= landmarks.shape[1] <= min(MAX_LANDMARKS, query.shape[2])
    return _covers_sizes(query) and count and 1 <= iterations <= MAX_ITERATIONS


def _covers_sizes(query: Tensor) -> bool:
    batch, heads, tokens, head_size = query.shape
    sizes = 0 < head_size <= MAX_HEAD_SIZE and head_size % HEAD_SIZE_STEP == 0 and 0 < batch * heads <= MAX_GRID_Y
    return query.dtype in DTYPE_NAMES and sizes and heads * tokens * head_size < 2**31


def kernel_layout(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as they are where one set of strides describes them all (linear, or views of a packed QKV), else copies.

    The last dimension is contiguous, the other strides are multiples of 16 elements, and addresses of 16 bytes.
    """
    strides = query.stride()
    same = key.stride() == strides and value.stride() == strides
    # A packed [B, N, 3, H, D] has its own batch stride, which is free; int32 holds every stride.
    plain = strides[3] == 1 and all(s % 16 == 0 and 0 < s < 2**31 for s in strides[:3])
    if same and plain and all(t.data_ptr() % POINTER_ALIGNMENT == 0 for t in (query, key, value)):
        return query, key, value
    return _linear(query), _linear(key), _linear(value)


def run_plan(plan: LaunchPlan, tensors: dict[str, Tensor]) -> None:
    """Execute a plan on the current stream of the tensors' device; scratch comes from PyTorch's allocator."""
    device = next(iter(tensors.values())).device
    with torch.cuda.device(device):
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
        if choose_backend() == "table":
            _run_table(plan, tensors, workspace)
        else:
            launch_jit(plan, tensors, workspace)


def _run_table(plan: LaunchPlan, tensors: dict[str, Tensor], workspace: Tensor) -> None:
    loader = _loader(workspace.device.index)
    base = workspace.data_ptr()
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    addresses |= {name: base + buffer.offset for name, buffer in plan.buffers.items()}
    stream = torch.cuda.current_stream().cuda_stream
    for launch in plan.launches:
        arguments = [addresses[a] if isinstance(a, str) else a for a in launch.arguments]
        loader.launch(launch.variant, launch.grid, arguments, stream)


def launch_jit(plan: LaunchPlan, tensors: dict[str, Tensor], workspace: Tensor, *, upcast: bool = False) -> None:
    """Execute a plan through Triton: compiled just in time, or interpreted on the CPU (then with `upcast` for bf16)."""
    from fna.plugins.kernels.registry import constants, kernel_of, options

    every = {**tensors, **scratch_views(plan, workspace, next(iter(tensors.values())).dtype)}
    sm = _capability(workspace.device.index) if workspace.is_cuda else OLDEST_CHIP
    for launch in plan.launches:
        arguments = [every[a] if isinstance(a, str) else a for a in launch.arguments]
        blocks = constants(launch.variant, upcast=upcast)
        kernel_of(launch.variant, sm)[launch.grid](*arguments, **blocks, **options(launch.variant, sm))


def scratch_views(plan: LaunchPlan, workspace: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The buffers of a plan as flat views of its workspace; `mixed` has the type of the inputs."""
    kinds = {"mixed": dtype} | dict.fromkeys(("best_index", "candidates", "hot_tokens", "listed"), torch.int32)
    return {
        name: workspace[buffer.offset : buffer.offset + buffer.size].view(kinds.get(name, torch.float32))
        for name, buffer in plan.buffers.items()
    }


@functools.lru_cache(maxsize=256)
def _cached_attention_plan(
    shape: AttentionShape,
    scale: float,
    iterations: int,
    exact_rows: bool,
    processors: int,
    strides: Strides,
    sink: bool,
    chebyshev: ChebyshevSteps | None,
) -> LaunchPlan:
    return attention_plan(
        shape, scale=scale, iterations=iterations, exact_rows=exact_rows, multiprocessors=processors, strides=strides,
        sink=sink, chebyshev=chebyshev,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _cached_focal_plan(
    shape: FocalShape, prefix_tokens: int, hot: int, scale: float, processors: int, strides: Strides
) -> LaunchPlan:
    return focal_plan(
        shape, prefix_tokens=prefix_tokens, hot=hot, scale=scale, multiprocessors=processors, strides=strides
    )


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _table() -> Table | None:
    return find_table()


@functools.cache
def _loader(index: int):  # type: ignore[no-untyped-def]
    from fna.plugins.cuda_driver import Loader

    table = _table()
    assert table is not None, "the table backend was chosen without a table"
    return Loader(table, _capability(index))


def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def _linear(tensor: Tensor) -> Tensor:
    return _aligned(tensor.contiguous())


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if tensor.data_ptr() % POINTER_ALIGNMENT == 0 else tensor.clone()
