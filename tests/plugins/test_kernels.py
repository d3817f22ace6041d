"""Every kernel, run by Triton's interpreter, against its plain-torch twin in fp64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fna.attention import chebyshev_core, nystrom_attention_reference
from fna.chebyshev import ChebyshevSteps
from fna.plugins.emulate import run_attention, run_sampling
from fna.plugins.kernels.twins import core_twin, finish_twin, gather_landmarks, landmark_twin, output_twin
from fna.plugins.launch_plan import TILE, padded_head_size, padded_landmarks
from fna.plugins.sampling_plan import sampling_plan
from fna.samplers.fps import farthest_points_reference

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

RELATIVE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative error (in the 2-norm) of the whole output that the kernels are held to, on a GPU too."""

MANY_STEPS, ONE_STEP = ChebyshevSteps(8, 0.05), ChebyshevSteps(1, 0.3)


@dataclass(frozen=True)
class Call:
    """Arguments of one FastNystromAttention."""

    query: Tensor
    key: Tensor
    value: Tensor
    landmarks: Tensor
    bias: Tensor

    @property
    def scale(self) -> float:
        """1 / sqrt(D)."""
        return self.query.shape[-1] ** -0.5


def make_call(
    dtype: torch.dtype, batch: int, heads: int, tokens: int, count: int, head_size: int, *, shared: bool = False
) -> Call:
    rows = 1 if shared else batch
    query, key, value = (torch.randn(batch, heads, tokens, head_size).mul(1.5).to(dtype) for _ in range(3))
    landmarks = torch.stack([torch.randperm(tokens)[:count] for _ in range(rows)]).int()
    return Call(query, key, value, landmarks, torch.rand(rows, count))


def reference(call: Call, *, exact_rows: bool, iterations: int = 6) -> Tensor:
    full = (tensor.double() for tensor in (call.query, call.key, call.value))
    return nystrom_attention_reference(*full, call.landmarks, call.bias.double(), call.scale, iterations, exact_rows)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.fixture
def attend(interpreter: ProcessPoolExecutor) -> Callable[..., dict[str, Tensor]]:
    """Run the attention kernels; returns the output and all scratch."""

    def run(call: Call, **options: Any) -> dict[str, Tensor]:
        arguments = (call.query, call.key, call.value, call.landmarks, call.bias)
        return interpreter.submit(run_attention, *arguments, **options).result()

    return run


@pytest.fixture
def sample(interpreter: ProcessPoolExecutor) -> Callable[..., Tensor]:
    """Run the sampling kernels."""
    return lambda *arguments: interpreter.submit(run_sampling, *arguments).result()


@pytest.mark.parametrize(
    ("dtype", "exact_rows", "batch", "heads", "tokens", "count", "head_size"),
    [
        pytest.param(torch.float32, True, 1, 2, 197, 33, 64, id="N197-S33-D64"),
        pytest.param(torch.float16, False, 2, 1, 131, 1, 80, id="N131-S1-D80"),
        pytest.param(torch.float16, True, 2, 2, 141, 64, 80, id="N141-S64-D80"),
        pytest.param(torch.float32, False, 1, 1, 201, 128, 64, id="N201-S128-D64"),
        pytest.param(torch.float16, True, 1, 1, 129, 65, 128, id="N129-S65-D128"),
        pytest.param(torch.float32, True, 1, 1, 64, 64, 32, id="N64-S64-D32: every token a landmark"),
        pytest.param(torch.float16, False, 1, 1, 1, 1, 96, id="N1-S1-D96: one token"),
    ],
)
def test_output_agrees_with_the_twin(attend, dtype, batch, heads, tokens, count, head_size, exact_rows) -> None:
    call = make_call(dtype, batch, heads, tokens, count, head_size)
    out = attend(call, exact_rows=exact_rows)["out"]
    assert out.dtype == dtype
    assert relative_error(out, reference(call, exact_rows=exact_rows)) < RELATIVE[dtype]


def test_bfloat16_agrees_with_the_twin(attend) -> None:
    call = make_call(torch.bfloat16, 1, 2, 150, 40, 64)
    assert relative_error(attend(call)["out"], reference(call, exact_rows=False)) < RELATIVE[torch.bfloat16]


def test_many_landmarks_iterate_over_several_programs(attend) -> None:
    call = make_call(torch.float32, 1, 1, 210, 200, 32)
    out = attend(call, exact_rows=True, iterations=2)["out"]
    assert relative_error(out, reference(call, exact_rows=True, iterations=2)) < RELATIVE[torch.float32]


@pytest.mark.parametrize(
    ("dtype", "count", "iterations"),
    [(torch.float16, 20, 1), (torch.float16, 20, 3), (torch.float32, 20, 3), (torch.float32, 70, 1)],
)
def test_other_numbers_of_iterations(attend, dtype, count, iterations) -> None:
    call = make_call(dtype, 1, 1, 90, count, 32)
    found = attend(call, iterations=iterations)["out"]
    assert relative_error(found, reference(call, exact_rows=False, iterations=iterations)) < RELATIVE[dtype]


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 33), (torch.float16, 33), (torch.float32, 100)])
def test_each_launch_agrees_with_its_own_twin(attend, dtype, count) -> None:
    call = make_call(dtype, 1, 2, 150, count, 64)
    found = attend(call)
    full = [tensor.double() for tensor in (call.query, call.key, call.value)]
    exact, inverse, product = landmark_twin(*full, call.landmarks, call.bias.double(), scale=call.scale, iterations=6)
    pad, block = padded_landmarks(count), padded_head_size(64)
    halves = dtype != torch.float32 and pad == TILE
    stored = found["matrices"].view(torch.float16 if halves else torch.float32)
    matrices = stored.view(1, 2, -1, pad, pad)[..., :count, :count].double()
    if halves:  # there R = 1 - W stands for W
        matrices[:, :, 1] = torch.eye(count) - matrices[:, :, 1]
    tolerance = RELATIVE[dtype]
    assert relative_error(found["exact"].view(1, 2, pad, block)[:, :, :count], exact) < tolerance
    assert relative_error(matrices[:, :, 0], inverse) < tolerance
    assert relative_error(matrices[:, :, 1], product) < tolerance

    # finish and output are given what the launches before them found, so that each answers for itself.
    known = found["exact"].view(1, 2, pad, block)[:, :, :count].double()
    mixed = finish_twin(known, matrices[:, :, 0], matrices[:, :, 1])
    stored = found["mixed"].view(1, 2, pad, block)[:, :, :count] * found["mixed_scale"].view(1, 2, 1, block)
    assert relative_error(stored, mixed) < tolerance
    out = output_twin(
        full[0], full[1], call.landmarks, call.bias.double(), known, stored.double(), scale=call.scale, exact_rows=False
    )
    assert relative_error(found["out"], out) < tolerance


@pytest.mark.parametrize(
    ("dtype", "batch", "count", "head_size", "steps"),
    [
        pytest.param(torch.float16, 2, 33, 80, MANY_STEPS, id="fp16, 64 landmarks"),
        pytest.param(torch.float16, 1, 100, 64, ONE_STEP, id="fp16, 128 landmarks"),
        pytest.param(torch.bfloat16, 1, 128, 64, MANY_STEPS, id="bf16, 128 landmarks"),
        pytest.param(torch.float16, 1, 200, 32, MANY_STEPS, id="fp16 through scratch, several programs"),
        pytest.param(torch.float32, 1, 33, 64, ONE_STEP, id="fp32, 64 landmarks"),
        pytest.param(torch.float32, 1, 128, 32, MANY_STEPS, id="fp32, 128 landmarks"),
        pytest.param(torch.float32, 1, 200, 32, ONE_STEP, id="fp32, 256 landmarks"),
    ],
)
def test_each_launch_with_the_chebyshev_core_agrees_with_its_own_twin(
    attend, dtype, batch, count, head_size, steps
) -> None:
    call = make_call(dtype, batch, 1, max(count + 3, 140), count, head_size)
    found = attend(call, chebyshev=steps)
    full = [tensor.double() for tensor in (call.query, call.key, call.value)]
    core, normal = core_twin(full[0], full[1], call.landmarks, call.bias.double(), scale=call.scale)
    exact, _, _ = landmark_twin(*full, call.landmarks, call.bias.double(), scale=call.scale, iterations=1)
    pad, block, tolerance = padded_landmarks(count), padded_head_size(head_size), RELATIVE[dtype]
    halves = dtype != torch.float32 and pad <= 128
    stored = found["matrices"].view(torch.float16 if halves else torch.float32)
    matrices = stored.view(batch, 1, 2, pad, pad)[..., :count, :count].double()
    known = found["exact"].view(batch, 1, pad, block)[:, :, :count, :head_size].double()
    assert relative_error(known, exact) < tolerance
    assert relative_error(matrices[:, :, 0], core) < tolerance
    assert relative_error(matrices[:, :, 1] * (-1 if halves else 1), normal) < tolerance
    if halves:
        sums = found["colsum"][: batch * pad * pad // 64].view(batch, -1)[:, :count]
        assert relative_error(sums, core[:, 0].sum(-2)) < tolerance

    # finish and output are given what the launches before them found, so that each answers for itself.
    mixed = chebyshev_core(matrices[:, :, 0], known, gather_landmarks(full[2], call.landmarks), steps.steps, steps.low)
    scale = found["mixed_scale"].view(batch, 1, 1, block)
    kept = (found["mixed"].view(batch, 1, pad, block)[:, :, :count].double() * scale)[..., :head_size]
    assert relative_error(kept, mixed) < tolerance
    out = output_twin(
        full[0], full[1], call.landmarks, call.bias.double(), known, kept, scale=call.scale, exact_rows=False
    )
    assert relative_error(found["out"], out) < tolerance


@pytest.mark.parametrize(("dtype", "count", "sink"), [(torch.float16, 100, True), (torch.float32, 70, False)])
def test_masked_keys_agree_with_the_twin_with_the_chebyshev_core(attend, dtype, count, sink) -> None:
    """The core's own masks are the same code as Newton-Schulz's; A with a mask shows in what the steps reach."""
    call = make_call(dtype, 1, 1, 140, count, 32)
    mask = (torch.rand(1, 140) < 0.2).int()
    mask[:, call.landmarks[0, :3].long()] = 1
    found = attend(call, key_mask=mask, sink=sink, chebyshev=ChebyshevSteps(8, 0.05))
    pad = padded_landmarks(count)
    known = found["exact"].view(1, 1, pad, 64)[:, :, :count, :32].double()
    hidden = mask[0].double() * 16384
    at = call.landmarks[0].long()
    ordinary = 1 - mask[0].double() if sink else torch.ones(140, dtype=torch.float64)
    scores = call.scale * call.query[0, 0, at].double() @ call.key[0, 0, at].double().mT + call.bias.double()
    core = torch.softmax(scores - ordinary[at][:, None] * hidden[at], -1)[None, None]
    mixed = chebyshev_core(core, known, gather_landmarks(call.value.double(), call.landmarks), 8, 0.05)
    kept = found["mixed"].view(1, 1, pad, 64)[:, :, :count].double() * found["mixed_scale"].view(1, 1, 1, 64)
    assert relative_error(kept[..., :32], mixed) < RELATIVE[dtype]


def test_landmarks_that_nobody_attends_to_keep_the_mean_correction(attend) -> None:
    """Where the floor of the column sums binds, the steps no longer solve for a constant: the residual's mean must be right."""
    call = make_call(torch.float16, 1, 1, 90, 40, 32)
    bias = call.bias.clone()
    bias[:, 0] += 8
    hub = Call(call.query, call.key, call.value + 3, call.landmarks, bias)
    found = attend(hub, chebyshev=ChebyshevSteps(8, 0.05))
    core, _ = core_twin(hub.query.double(), hub.key.double(), hub.landmarks, bias.double(), scale=hub.scale)
    assert (core.sum(-2) < 0.1).any()
    known = found["exact"].view(1, 1, 64, 64)[:, :, :40, :32].double()
    mixed = chebyshev_core(core, known, gather_landmarks(hub.value.double(), hub.landmarks), 8, 0.05)
    kept = found["mixed"].view(1, 1, 64, 64)[:, :, :40].double() * found["mixed_scale"].view(1, 1, 1, 64)
    assert relative_error(kept[..., :32], mixed) < RELATIVE[torch.float16]


def test_values_beyond_the_range_of_fp16_step_in_their_own_units(attend) -> None:
    call = make_call(torch.bfloat16, 1, 1, 90, 70, 32)
    large = Call(call.query, call.key, call.value * 2.0**100, call.landmarks, call.bias)
    found, plain = (attend(each, chebyshev=ChebyshevSteps(8, 0.05))["out"] for each in (large, call))
    assert torch.isfinite(found).all()
    assert relative_error(found.double() / 2.0**100, plain) < 1e-6  # the unit is a power of two


def test_real_weights_give_the_published_codes_output(attend) -> None:
    """Inputs from DINOv2-S on a photograph, with the landmarks and outputs of the published code."""
    file = np.load(GOLDEN / "dinov2s_257_layer09_s64_masks.npz")
    query, key, value = (torch.from_numpy(file[part]).float() for part in ("query", "key", "value"))
    landmarks = torch.from_numpy(file["landmarks"])
    assert float(file["scale"]) == pytest.approx(64**-0.5)
    call = Call(query, key, value, landmarks, torch.zeros(landmarks.shape))
    wanted = torch.from_numpy(file["out_fp32"])
    assert (attend(call)["out"] - wanted).abs().max() < 2e-5


def masked_reference(call: Call, mask: Tensor, *, sink: bool, iterations: int = 6) -> Tensor:
    full = (tensor.double() for tensor in (call.query, call.key, call.value))
    return nystrom_attention_reference(
        *full, call.landmarks, call.bias.double(), call.scale, iterations, True, key_mask=mask, sink=sink
    )


@pytest.mark.parametrize(
    ("dtype", "tokens", "count", "rows", "sink"),
    [
        pytest.param(torch.float16, 150, 33, 1, False, id="in registers"),
        pytest.param(torch.float16, 90, 33, 1, True, id="in registers, sinks"),
        pytest.param(torch.float32, 131, 20, 2, True, id="through scratch"),
        pytest.param(torch.float16, 140, 100, 2, True, id="two tiles of landmarks"),
        pytest.param(torch.float16, 210, 200, 1, False, id="several programs"),
    ],
)
def test_masked_keys_agree_with_the_twin(attend, dtype, tokens, count, rows, sink) -> None:
    call = make_call(dtype, 2 if count < 100 else 1, 1, tokens, count, 32)
    mask = (torch.rand(min(rows, len(call.query)), tokens) < 0.2).int()
    mask[:, call.landmarks[0, :3].long()] = 1
    steps = 1 if count > 128 else 6
    out = attend(call, exact_rows=True, key_mask=mask, sink=sink, iterations=steps)["out"]
    assert relative_error(out, masked_reference(call, mask, sink=sink, iterations=steps)) < RELATIVE[dtype]
    assert relative_error(out, reference(call, exact_rows=True, iterations=steps)) > 10 * RELATIVE[dtype]


def test_a_stretch_of_keys_that_is_masked_throughout_counts_for_nothing(attend) -> None:
    call = make_call(torch.float32, 1, 1, 330, 16, 32)
    mask = torch.zeros(1, 330, dtype=torch.int32)
    mask[:, :200] = 1
    call.landmarks[0] = torch.arange(16) * 20
    found = attend(call, exact_rows=True, key_mask=mask, multiprocessors=200)["out"]
    assert relative_error(found, masked_reference(call, mask, sink=False)) < RELATIVE[torch.float32]


def test_a_mask_of_zeros_changes_no_bit(attend) -> None:
    call = make_call(torch.float16, 1, 1, 90, 33, 32)
    plain = attend(call, exact_rows=True)["out"]
    for sink in (False, True):
        none = torch.zeros(1, 90, dtype=torch.int32)
        assert torch.equal(attend(call, exact_rows=True, key_mask=none, sink=sink)["out"], plain)


def test_padding_stays_zero(attend) -> None:
    found = attend(make_call(torch.float32, 1, 1, 150, 70, 64))
    matrices = found["matrices"].view(5, 128, 128)
    assert not matrices[:2, 70:].any()
    assert not matrices[:2, :, 70:].any()
    assert not found["exact"].view(128, 64)[70:].any()


def test_landmarks_and_bias_may_be_shared_by_the_batch(attend) -> None:
    call = make_call(torch.float32, 3, 1, 80, 12, 32, shared=True)
    assert relative_error(attend(call, exact_rows=True)["out"], reference(call, exact_rows=True)) < 2e-5


def test_packed_query_key_value_need_no_copy(attend) -> None:
    packed = torch.randn(2, 100, 3, 2, 64)  # [B, N, 3, H, D], as a linear layer leaves it
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    call = Call(query, key, value, torch.arange(0, 100, 7).int()[None], torch.zeros(1, 15))
    assert query.stride(2) == 3 * 2 * 64
    assert relative_error(attend(call)["out"], reference(call, exact_rows=False)) < 2e-5


@pytest.mark.parametrize("multiprocessors", [1, 200])
def test_the_split_of_the_keys_does_not_matter(attend, multiprocessors) -> None:
    call = make_call(torch.float32, 1, 1, 330, 16, 32)
    found = attend(call, multiprocessors=multiprocessors)["out"]
    assert relative_error(found, reference(call, exact_rows=False)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_duplicate_tokens_and_landmarks(attend, dtype) -> None:
    call = make_call(dtype, 1, 1, 90, 32, 64)
    for tensor in (call.query, call.key, call.value):
        tensor[:, :, 45:] = tensor[:, :, :45]
    call.landmarks[0, 16:] = call.landmarks[0, :16]
    assert relative_error(attend(call, exact_rows=True)["out"], reference(call, exact_rows=True)) < RELATIVE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_massive_norms_stay_finite_and_right(attend, dtype) -> None:
    call = make_call(dtype, 1, 1, 90, 16, 64)
    call.query[:, :, :3] *= 100
    call.key[:, :, :3] *= 100
    call.value[:, :, :3] = 3e4  # sums such as 13 Bv pass the largest fp16 number, 65504
    call.landmarks[0] = torch.arange(16) * 4
    out = attend(call, exact_rows=True)["out"]
    assert out.isfinite().all()
    assert relative_error(out, reference(call, exact_rows=True)) < RELATIVE[dtype]


def test_all_equal_tokens_give_their_common_value(attend) -> None:
    call = make_call(torch.float16, 1, 1, 70, 20, 32)
    for tensor in (call.query, call.key, call.value):
        tensor[:] = tensor[:, :, :1].clone()
    out = attend(call)["out"]
    assert relative_error(out, reference(call, exact_rows=False)) < RELATIVE[torch.float16]


def test_wrong_indices_stay_inside_the_tensors(attend) -> None:
    call = make_call(torch.float32, 1, 1, 50, 4, 32)
    clamped = Call(call.query, call.key, call.value, torch.tensor([[0, 7, 49, 9]]).int(), call.bias)
    wild = Call(call.query, call.key, call.value, torch.tensor([[-5, 7, 10**9, 9]]).int(), call.bias)
    assert torch.equal(attend(wild, exact_rows=True)["out"], attend(clamped, exact_rows=True)["out"])


@pytest.mark.parametrize(
    ("dtype", "batch", "tokens", "channels", "count", "launches"),
    [
        pytest.param(torch.float16, 2, 131, 48, 33, 1, id="one launch"),
        pytest.param(torch.float32, 2, 64, 7, 64, 1, id="one launch: all tokens, odd channels"),
        pytest.param(torch.float16, 1, 1100, 20, 9, 9, id="a launch for each landmark"),
        pytest.param(torch.float32, 2, 200, 400, 7, 7, id="a launch for each landmark: wide"),
    ],
)
def test_farthest_points_are_the_twins_exactly(sample, dtype, batch, tokens, channels, count, launches) -> None:
    features = torch.randn(batch, tokens, channels).to(dtype)
    features[:, tokens // 2 : tokens // 2 + 8] = features[:, :8]  # ties
    plan = sampling_plan("fp32" if dtype == torch.float32 else "fp16", batch, tokens, channels, count)
    assert len(plan.launches) == launches
    assert torch.equal(sample(features, count), farthest_points_reference(features, count))


@pytest.mark.parametrize(("dtype", "count", "launches"), [(torch.float16, 24, 1), (torch.float32, 6, 6)])
def test_farthest_points_of_real_hidden_states_are_the_twins_exactly(sample, dtype, count, launches) -> None:
    hidden = torch.from_numpy(np.load(GOLDEN / "dinov2s_257_layer09_s64_masks.npz")["hidden"]).to(dtype)
    assert len(sampling_plan("fp16" if dtype == torch.float16 else "fp32", *hidden.shape, count).launches) == launches
    assert torch.equal(sample(hidden, count), farthest_points_reference(hidden, count))


def test_farthest_points_of_equal_tokens_are_the_lowest_indices(sample) -> None:
    features = torch.ones(1, 40, 16)
    assert sample(features, 10).tolist() == [list(range(10))]


def test_farthest_points_with_many_tiles(sample) -> None:
    """More tiles than one pass over their bests takes (256), so that the passes are joined."""
    features = torch.randn(1, 16500, 1)
    features[0, 16450] = 100.0
    assert torch.equal(sample(features, 2), farthest_points_reference(features, 2))
