"""The kernels of focal attention, run by Triton's interpreter, against `fna.focal_attention` in fp64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fna.focal import find_hot_keys, focal_attention
from fna.focal_keys import Levels, focal_keys
from fna.plugins.emulate import run_focal

RELATIVE = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
"""Relative error (in the 2-norm) of the whole output that the kernels are held to."""


@dataclass(frozen=True)
class Focal:
    """Settings of one call."""

    patches: tuple[int, int] = (9, 9)
    prefix_tokens: int = 1
    tile: int = 4
    levels: Levels = ((1, 0), (2, 2))
    hot: int = 5

    @property
    def tokens(self) -> int:
        """N."""
        return self.prefix_tokens + self.patches[0] * self.patches[1]


Run = Callable[..., dict[str, Tensor]]


@pytest.fixture
def attend(interpreter: ProcessPoolExecutor) -> Run:
    """Run the kernels; returns the output and all scratch."""

    def run(
        focal: Focal, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, **options: int
    ) -> dict[str, Tensor]:
        lists = focal_keys(focal.patches, focal.prefix_tokens, focal.tile, focal.levels)
        queries, keys, bias, _ = lists.tensors()
        return interpreter.submit(
            run_focal, query, key, value, queries, keys, bias,
            prefix_tokens=focal.prefix_tokens, hot=focal.hot, key_mask=key_mask, **options,
        ).result()  # fmt: skip

    return run


def make_inputs(focal: Focal, dtype: torch.dtype, batch: int = 1, heads: int = 2, head_size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(focal.tokens)
    shape = batch, heads, focal.tokens, head_size
    return [torch.randn(shape, generator=generator).mul(1.5).to(dtype) for _ in range(3)]


def reference(focal: Focal, inputs: list[Tensor], key_mask: Tensor | None = None) -> Tensor:
    query, key, value = (tensor.double() for tensor in inputs)
    return focal_attention(
        query, key, value, patches=focal.patches, prefix_tokens=focal.prefix_tokens, tile=focal.tile,
        levels=focal.levels, hot=focal.hot, key_mask=key_mask,
    )  # fmt: skip


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "focal", "batch", "heads", "head_size"),
    [
        pytest.param(FP32, Focal((11, 7), 1, 4, ((1, 0), (2, 2)), 5), 1, 2, 64, id="ragged edges"),
        pytest.param(FP16, Focal((17, 18), 5, 8, ((1, 0), (2, 2), (4, 6)), 16), 1, 1, 48, id="registers, three levels"),
        pytest.param(BF16, Focal((13, 10), 0, 9, ((1, 0), (3, 1)), 1), 2, 1, 80, id="no prefix, tiles of two programs"),
        pytest.param(FP32, Focal((6, 6), 2, 3, ((1, 0),), 0), 1, 2, 128, id="exact, no hot keys"),
        pytest.param(FP16, Focal((6, 6), 2, 3, ((1, 0),), 0), 1, 1, 128, id="exact, no hot keys, in halves"),
    ],
)  # fmt: skip
def test_output_agrees_with_the_twin(attend: Run, dtype, focal, batch, heads, head_size) -> None:
    inputs = make_inputs(focal, dtype, batch, heads, head_size)
    out = attend(focal, *inputs)["out"]
    assert out.dtype == dtype
    assert relative_error(out, reference(focal, inputs)) < RELATIVE[dtype]


@pytest.mark.parametrize(("rows", "hot"), [(1, 7), (2, 0)])
def test_masked_keys_agree_with_the_twin(attend: Run, rows: int, hot: int) -> None:
    focal = Focal((11, 9), 2, 4, ((1, 0), (2, 2)), hot)
    inputs = make_inputs(focal, torch.float32, batch=2, heads=1)
    mask = (torch.rand(rows, focal.tokens, generator=torch.Generator().manual_seed(0)) < 0.3).int()
    mask[:, 1] = 1
    out = attend(focal, *inputs, key_mask=mask)["out"]
    assert relative_error(out, reference(focal, inputs, mask)) < RELATIVE[torch.float32]
    assert relative_error(out, reference(focal, inputs)) > 0.1


def test_hot_keys_are_those_of_the_definition(attend: Run) -> None:
    focal = Focal((25, 23), 1, 8, ((1, 0), (2, 2)), 20)
    inputs = make_inputs(focal, torch.float16, heads=1)
    tokens = attend(focal, *inputs)["hot_tokens"].view(1, -1)[:, : focal.hot]
    query, key = inputs[0].double() * 32**-0.5, inputs[1].double()
    wanted = find_hot_keys(query, key, torch.zeros(key.shape[:3]), focal.prefix_tokens, focal.hot)
    assert torch.equal(tokens.long(), wanted[0])  # both with the highest score first


def test_programs_that_share_a_head_find_the_same_hot_keys(attend: Run) -> None:
    focal = Focal((30, 27), 2, 8, ((1, 0), (2, 2)), 20)
    inputs = make_inputs(focal, torch.float16, heads=1, head_size=48)
    mask = (torch.rand(1, focal.tokens, generator=torch.Generator().manual_seed(0)) < 0.2).int()
    alone, shared = (attend(focal, *inputs, key_mask=mask, multiprocessors=count) for count in (1, 100))
    assert "query_sums" in shared
    assert len(shared["query_sums"]) > len(alone["query_sums"])
    assert torch.equal(shared["hot_tokens"], alone["hot_tokens"])
    assert torch.equal(shared["out"], alone["out"])


def test_all_patches_may_be_hot(attend: Run) -> None:
    focal = Focal((8, 8), 1, 4, ((1, 0), (2, 2)), 64)
    inputs = make_inputs(focal, torch.float32)
    assert relative_error(attend(focal, *inputs)["out"], reference(focal, inputs)) < RELATIVE[torch.float32]


def test_among_equal_scores_the_lower_tokens_are_hot(attend: Run) -> None:
    focal = Focal((9, 9), 1, 4, ((1, 0), (2, 2)), 6)
    query, key, value = make_inputs(focal, torch.float32, heads=1)
    key[:, :, 11:] = key[:, :, 11:12]
    found = attend(focal, query, key, value)
    higher = (key @ query[:, :, 1:].mean(2, keepdim=True).mT)[0, 0, 1:11, 0] > (
        key @ query[:, :, 1:].mean(2, keepdim=True).mT
    )[0, 0, 11, 0]
    first = [1 + i for i in range(10) if higher[i]]
    assert len(first) < focal.hot
    wanted = sorted([*first, *range(11, 11 + focal.hot - len(first))])
    assert sorted(found["hot_tokens"][: focal.hot].tolist()) == wanted
    assert found["out"].isfinite().all()


def test_more_candidates_than_are_ranked_at_once(attend: Run) -> None:
    """All scores equal: every patch reaches the threshold."""
    focal = Focal((15, 12), 1, 4, ((1, 0), (2, 2)), 9)
    query, key, value = make_inputs(focal, torch.float32, heads=1)
    key[:] = key[:, :, :1].clone()
    found = attend(focal, query, key, value)
    assert found["hot_tokens"][: focal.hot].tolist() == list(range(1, 1 + focal.hot))
    assert found["out"].isfinite().all()


def test_massive_norms_stay_finite_and_right(attend: Run) -> None:
    focal = Focal()
    query, key, value = make_inputs(focal, torch.float16)
    query[:, :, :3] *= 1e3
    key[:, :, :3] *= 1e3
    out = attend(focal, query, key, value)["out"]
    assert out.isfinite().all()
    assert relative_error(out, reference(focal, [query, key, value])) < RELATIVE[torch.float16]


def test_packed_query_key_value_need_no_copy(attend: Run) -> None:
    focal = Focal()
    packed = torch.randn(2, focal.tokens, 3, 2, 64, generator=torch.Generator().manual_seed(1))  # [B, N, 3, H, D]
    inputs = list(packed.permute(2, 0, 3, 1, 4))
    assert relative_error(attend(focal, *inputs)["out"], reference(focal, inputs)) < RELATIVE[torch.float32]


def test_wrong_lists_stay_inside_the_tensors(interpreter: ProcessPoolExecutor) -> None:
    focal = Focal()
    inputs = make_inputs(focal, torch.float32)
    queries, keys, bias, _ = focal_keys(focal.patches, 1, focal.tile, focal.levels).tensors()
    wild, clamped = keys.clone(), keys.clone()
    wild[:, 3], clamped[:, 3] = 10**9, focal.tokens - 1
    wild[:, 5], clamped[:, 5] = -4, 0
    outs = [
        interpreter.submit(run_focal, *inputs, queries, each, bias, prefix_tokens=1, hot=3).result()["out"]
        for each in (wild, clamped)
    ]
    assert torch.equal(*outs)
