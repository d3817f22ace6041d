"""Run the kernels on the CPU under Triton's interpreter, in a process of its own.

The interpreter is chosen when Triton is first imported, so it cannot share a process with a compiler. `interpreter()` starts a
process that has it; `run_attention` and `run_sampling` are called in that process:

    with interpreter() as pool:
        out = pool.submit(run_attention, query, key, value, landmarks).result()
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch import Tensor

from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import ChebyshevSteps
from fna.plugins.focal_plan import focal_plan
from fna.plugins.launch_plan import LaunchPlan, Strides, attention_plan
from fna.plugins.sampling_plan import sampling_plan
from fna.plugins.torch_ops import DTYPE_NAMES, attention_shape, focal_shape, launch_jit, scratch_views

POISON = 0x7F
"""Every byte of scratch and output starts as this: 3.4e38 as fp32, NaN as fp16, so that a read before a write shows."""


def interpreter(workers: int = 1) -> ProcessPoolExecutor:
    """Return a pool of processes whose Triton kernels run on the CPU."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def run_attention(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    landmarks: Tensor,  # [B, S] or [1, S], int32
    bias: Tensor | None = None,  # [B, S] or [1, S], fp32
    *,
    key_mask: Tensor | None = None,  # [B, N] or [1, N], int32
    sink: bool = False,
    iterations: int = NEWTON_SCHULZ_ITERATIONS,
    exact_rows: bool = False,
    multiprocessors: int = 4,
    chebyshev: ChebyshevSteps | None = None,
) -> dict[str, Tensor]:
    """Run FastNystromAttention; return `out [B, H, N, D]` and every scratch buffer, flat, by name."""
    bias = torch.zeros(1, landmarks.shape[1]) if bias is None else bias
    shape = attention_shape(query, landmarks, bias, key_mask)
    plan = attention_plan(
        shape, scale=shape.head_size**-0.5, iterations=iterations, exact_rows=exact_rows, multiprocessors=multiprocessors,
        strides=Strides(*query.stride()[:3]), sink=sink, chebyshev=chebyshev,
    )  # fmt: skip
    out = _poisoned(torch.empty(query.shape, dtype=query.dtype))
    # Without a mask nothing may read it: the stand-in is too short for that.
    mask = torch.zeros(0, dtype=torch.int32) if key_mask is None else key_mask
    tensors = {"query": query, "key": key, "value": value, "landmarks": landmarks, "bias": bias, "key_mask": mask}
    return run_plan(plan, {**tensors, "out": out})


def run_focal(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    tile_queries: Tensor,  # [T, Q], int32
    tile_keys: Tensor,  # [T, K], int32
    tile_bias: Tensor,  # [T, K], fp32
    *,
    prefix_tokens: int,
    hot: int,
    key_mask: Tensor | None = None,  # [B, N] or [1, N], int32
    multiprocessors: int = 4,
) -> dict[str, Tensor]:
    """Run FocalAttention; return `out [B, H, N, D]` and every scratch buffer, flat, by name."""
    plan = focal_plan(
        focal_shape(query, tile_queries, tile_keys, key_mask), prefix_tokens=prefix_tokens, hot=hot,
        scale=query.shape[3] ** -0.5, multiprocessors=multiprocessors, strides=Strides(*query.stride()[:3]),
    )  # fmt: skip
    out = _poisoned(torch.empty(query.shape, dtype=query.dtype))
    tensors = {"query": query, "key": key, "value": value, "tile_queries": tile_queries, "tile_keys": tile_keys}
    tensors |= {"tile_bias": tile_bias, "key_mask": torch.zeros(0, dtype=torch.int32) if key_mask is None else key_mask}
    return run_plan(plan, {**tensors, "out": out})


def run_sampling(features: Tensor, num_landmarks: int, plan: LaunchPlan | None = None) -> Tensor:
    """Run FarthestPointSampling on `[B, N, C]`; return `[B, S]` int32."""
    batch, tokens, channels = features.shape
    plan = plan or sampling_plan(DTYPE_NAMES[features.dtype], batch, tokens, channels, num_landmarks)
    landmarks = _poisoned(torch.empty(batch, num_landmarks, dtype=torch.int32))
    return run_plan(plan, {"features": features, "landmarks": landmarks})["landmarks"]


def run_plan(plan: LaunchPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Execute a plan on CPU tensors, the first of which has the type of the inputs; scratch starts poisoned.

    Returns:
        The tensors and every scratch buffer, flat, by name.
    """
    dtype = next(iter(tensors.values())).dtype
    workspace = torch.full((plan.workspace_bytes,), POISON, dtype=torch.uint8)
    launch_jit(plan, tensors, workspace, upcast=dtype == torch.bfloat16)
    return {**tensors, **scratch_views(plan, workspace, dtype)}


def _poisoned(tensor: Tensor) -> Tensor:
    tensor.view(torch.uint8).fill_(POISON)
    return tensor
