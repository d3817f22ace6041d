"""PyTorch's CUDA path, as far as it can be checked without a GPU: the interpreter takes the place of the launches."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import entry_points

import pytest
import torch
from torch import Tensor

from fna.attention import nystrom_attention_reference
from fna.chebyshev import ChebyshevSteps
from fna.cuda_kernels import ENTRY_POINT_GROUP
from fna.plugins import emulate, torch_ops
from fna.plugins.launch_plan import LaunchPlan
from fna.samplers.fps import farthest_points_reference
from fna.samplers.norm_grid import norm_grid_reference


@pytest.fixture
def launches(interpreter: ProcessPoolExecutor, monkeypatch) -> list[LaunchPlan]:
    """Make the CUDA path run its plans in the interpreter; returns the list of plans that it ran."""
    ran: list[LaunchPlan] = []

    def run(plan: LaunchPlan, tensors: dict[str, Tensor]) -> None:
        ran.append(plan)
        # The interpreter gets copies, so what it wrote is copied back.
        for name, result in interpreter.submit(emulate.run_plan, plan, tensors).result().items():
            if name in ("out", "landmarks") and name in tensors:
                tensors[name].copy_(result)

    monkeypatch.setattr(torch_ops, "run_plan", run)
    monkeypatch.setattr(torch_ops, "multiprocessors", lambda device: 4)
    return ran


def make_inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(batch, 2, 90, 32) for _ in range(3))
    return query, key, value, torch.arange(0, 90, 5).int()[None]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def reference(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, bias: Tensor | None) -> Tensor:
    return nystrom_attention_reference(query.double(), key.double(), value.double(), landmarks, bias, 0.2, 6, True)


@pytest.mark.parametrize("bias", [None, torch.rand(1, 18)])
def test_the_operator_runs_the_plan(launches, bias) -> None:
    inputs = make_inputs()
    found = torch_ops.attention(*inputs, bias, 0.2, 6, True)
    assert relative_error(found, reference(*inputs, bias)) < 2e-5
    assert len(launches) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_the_operator_with_the_cheaper_core_runs_its_plan(launches, masked) -> None:
    inputs = make_inputs()
    mask = (torch.rand(1, 90) < 0.2).int() if masked else None
    if masked:
        found = torch_ops.attention_with_key_mask(*inputs, None, mask, 0.2, 6, True, False, 8, 0.05)
    else:
        found = torch_ops.attention(*inputs, None, 0.2, 6, True, 8, 0.05)
    doubled = (tensor.double() for tensor in inputs[:3])
    wanted = nystrom_attention_reference(
        *doubled, inputs[3], None, 0.2, 6, True, mask, chebyshev=ChebyshevSteps(8, 0.05)
    )
    assert relative_error(found, wanted) < 2e-5
    assert {launch.variant.kernel for launch in launches[0].launches} >= {"landmark_chebyshev", "finish_chebyshev"}


@pytest.mark.parametrize("sink", [False, True])
def test_the_operator_with_a_mask_runs_the_plan(launches, sink) -> None:
    inputs = make_inputs(batch=2)
    mask = (torch.rand(2, 90) < 0.2).int()
    found = torch_ops.attention_with_key_mask(*inputs, None, mask, 0.2, 6, True, sink)
    query, key, value, landmarks = inputs
    wanted = nystrom_attention_reference(
        query.double(), key.double(), value.double(), landmarks, None, 0.2, 6, True, mask, sink
    )
    assert relative_error(found, wanted) < 2e-5
    assert len(launches) == 1


def test_views_of_a_packed_projection_are_not_copied(launches) -> None:
    packed = torch.randn(2, 90, 3, 2, 32)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    assert torch_ops.kernel_layout(query, key, value) == (query, key, value)
    landmarks = torch.arange(0, 90, 5).int()[None]
    found = torch_ops.attention(query, key, value, landmarks, None, 0.2, 6, True)
    assert found.is_contiguous()
    assert relative_error(found, reference(query, key, value, landmarks, None)) < 2e-5


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda q, k, v: (q, k.mT.contiguous().mT, v), id="strides differ"),
        pytest.param(
            lambda q, k, v: (q.mT.contiguous().mT, k.mT.contiguous().mT, v.mT.contiguous().mT), id="D strided"
        ),
        pytest.param(
            lambda q, k, v: tuple(torch.cat([t, t[..., :8]], -1)[..., :32] for t in (q, k, v)), id="odd stride"
        ),
    ],
)
def test_other_layouts_are_copied_into_a_linear_one(launches, change) -> None:
    query, key, value, landmarks = make_inputs()
    changed = change(query, key, value)
    assert all(tensor.is_contiguous() for tensor in torch_ops.kernel_layout(*changed))
    found = torch_ops.attention(*changed, landmarks, None, 0.2, 6, True)
    assert relative_error(found, reference(query, key, value, landmarks, None)) < 2e-5


@pytest.mark.parametrize(
    ("dtype", "head_size", "iterations"), [(torch.float64, 32, 6), (torch.float32, 40, 6), (torch.float32, 32, 65)]
)
def test_what_the_kernels_do_not_take_runs_as_the_twin(launches, dtype, head_size, iterations) -> None:
    query, key, value = (torch.randn(1, 1, 50, head_size, dtype=dtype) for _ in range(3))
    landmarks = torch.arange(0, 50, 7).int()[None]
    found = torch_ops.attention(query, key, value, landmarks, None, 0.2, iterations, False)
    wanted = nystrom_attention_reference(query, key, value, landmarks, None, 0.2, iterations, False)
    assert torch.equal(found, wanted)
    assert not launches


def test_sampling_runs_the_plan(launches) -> None:
    features = torch.randn(2, 100, 48)[:, :, ::2]
    assert torch.equal(torch_ops.farthest_points(features, 12), farthest_points_reference(features, 12))
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("dtype", "tokens", "channels", "count", "prefix"),
    [
        (torch.float16, 257, 48, 64, 1),
        (torch.float32, 70, 7, 33, 5),
        (torch.float32, 64, 16, 64, 1),
        (torch.float16, 300, 16, 256, 0),
        (torch.float32, 20, 16, 1, 1),
        (torch.float16, 20, 16, 3, 5),
    ],
)
def test_norm_grid_landmarks_are_the_twins_exactly(launches, dtype, tokens, channels, count, prefix) -> None:
    features = torch.randn(2, tokens, channels).to(dtype)
    found = torch_ops.norm_grid(features, count, prefix)
    assert torch.equal(found, norm_grid_reference(features, count, prefix))
    assert len(launches) == 1


def test_fna_finds_the_kernels_by_entry_point() -> None:
    found = {entry.value for entry in entry_points(group=ENTRY_POINT_GROUP)}
    assert found == {"fna.plugins.torch_ops:register"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_nothing_is_registered() -> None:
    assert torch_ops.register() is False
