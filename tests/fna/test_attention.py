"""What Fast Nyström Attention promises, beyond the golden files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fna.attention import (
    apply_newton_schulz,
    chebyshev_core,
    fast_nystrom_attention,
    newton_schulz_iterates,
    nystrom_attention_iterates,
    nystrom_attention_reference,
)
from fna.chebyshev import ChebyshevSteps, chebyshev_coefficients, default_core
from fna.errors import (
    FnaError,
    InvalidArgumentError,
    InvalidDtypeError,
    InvalidLandmarksError,
    InvalidShapeError,
    UnsupportedAttentionError,
)

few = settings(max_examples=20, deadline=None)


def make_inputs(batch: int = 2, heads: int = 3, tokens: int = 40, size: int = 16, count: int = 8, dtype=torch.float32):
    query, key, value = (torch.randn(batch, heads, tokens, size).to(dtype) for _ in range(3))
    landmarks = torch.stack([torch.randperm(tokens)[:count] for _ in range(batch)]).int()
    return query, key, value, landmarks


def textbook_fna(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, scale: float) -> Tensor:
    """The published formula for one batch item and one head, written out a second time without shortcuts."""
    qp, kp = query[landmarks.long()], key[landmarks.long()]
    core = torch.softmax(scale * qp @ kp.T, dim=1)
    inverse = core.T / core.sum(0).max()
    eye = torch.eye(len(core), dtype=core.dtype)
    for _ in range(6):
        product = core @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return torch.softmax(scale * query @ kp.T, dim=1) @ inverse @ torch.softmax(scale * qp @ key.T, dim=1) @ value


def test_equals_the_published_formula_written_out_per_head() -> None:
    query, key, value, landmarks = (t.double() if t.is_floating_point() else t for t in make_inputs())
    out = fast_nystrom_attention(query, key, value, landmarks)
    for item in range(2):
        for head in range(3):
            expected = textbook_fna(query[item, head], key[item, head], value[item, head], landmarks[item], 16**-0.5)
            torch.testing.assert_close(out[item, head], expected, rtol=1e-9, atol=1e-12)


def test_landmark_bias_weights_the_landmark_columns() -> None:
    query, key, value, landmarks = make_inputs(dtype=torch.float64)
    bias = torch.rand(2, 8, dtype=torch.float64)
    out = fast_nystrom_attention(query, key, value, landmarks, landmark_bias=bias, scale=0.3)
    index = landmarks.long()[:, None, :, None].expand(-1, 3, -1, 16)
    qp, kp = query.gather(2, index), key.gather(2, index)
    weight = bias.exp()[:, None, None, :]

    def weighted(scores: Tensor) -> Tensor:
        unnormalised = scores.exp() * weight
        return unnormalised / unnormalised.sum(-1, keepdim=True)

    core = weighted(0.3 * qp @ kp.mT)
    exact = torch.softmax(0.3 * qp @ key.mT, -1) @ value
    expected = weighted(0.3 * query @ kp.mT) @ apply_newton_schulz(core, exact, 6)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-12)


def test_exact_rows_are_exact_attention_and_leave_the_other_rows_alone() -> None:
    query, key, value, landmarks = make_inputs(dtype=torch.float64)
    plain = fast_nystrom_attention(query, key, value, landmarks)
    with_rows = fast_nystrom_attention(query, key, value, landmarks, exact_rows=True)
    attention = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    is_landmark = torch.zeros(2, 40, dtype=torch.bool).scatter(1, landmarks.long(), True)[:, None, :, None]
    torch.testing.assert_close(with_rows, torch.where(is_landmark, attention, plain))


@few
@given(seed=st.integers(0, 10_000))
def test_permuting_tokens_permutes_the_output(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value, landmarks = make_inputs(dtype=torch.float64)
    order = torch.randperm(40)
    moved = torch.argsort(order)[landmarks.long()].int()
    out = fast_nystrom_attention(query, key, value, landmarks, exact_rows=True)
    permuted = fast_nystrom_attention(query[:, :, order], key[:, :, order], value[:, :, order], moved, exact_rows=True)
    torch.testing.assert_close(permuted, out[:, :, order])


@few
@given(seed=st.integers(0, 10_000))
def test_all_tokens_as_well_conditioned_landmarks_approach_exact_attention(seed: int) -> None:
    torch.manual_seed(seed)
    query = torch.nn.functional.normalize(torch.randn(1, 2, 24, 32, dtype=torch.float64), dim=-1) * 8
    value = torch.randn(1, 2, 24, 32, dtype=torch.float64)
    everyone = torch.arange(24)[None].int()
    out = fast_nystrom_attention(query, query, value, everyone, scale=0.2)
    exact = torch.nn.functional.scaled_dot_product_attention(query, query, value, scale=0.2)
    assert torch.linalg.norm(out - exact) <= 1e-3 * torch.linalg.norm(exact)


@few
@given(seed=st.integers(0, 10_000), item=st.integers(0, 2))
def test_batch_items_do_not_influence_each_other(seed: int, item: int) -> None:
    torch.manual_seed(seed)
    query, key, value, landmarks = make_inputs(batch=3)
    together = fast_nystrom_attention(query, key, value, landmarks, exact_rows=True)
    rows = slice(item, item + 1)
    alone = fast_nystrom_attention(query[rows], key[rows], value[rows], landmarks[rows], exact_rows=True)
    torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exact_rows", [False, True])
@pytest.mark.parametrize(
    "tokens",
    [
        pytest.param(torch.ones(1, 2, 30, 16), id="all tokens equal"),
        pytest.param(torch.randn(1, 2, 3, 16).repeat(1, 1, 10, 1), id="duplicates"),
        pytest.param(torch.zeros(1, 2, 30, 16), id="zeros"),
        pytest.param(torch.nn.functional.normalize(torch.randn(1, 2, 30, 16), dim=-1) * 1e4, id="norms of 1e4"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_degenerate_tokens_give_finite_output(tokens: Tensor, dtype: torch.dtype, exact_rows: bool) -> None:
    typed = tokens.to(dtype)
    out = fast_nystrom_attention(typed, typed, typed, torch.arange(12)[None].int(), exact_rows=exact_rows)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_input_is_computed_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    query, key, value, landmarks = make_inputs(dtype=dtype)
    out = fast_nystrom_attention(query, key, value, landmarks)
    upcast = fast_nystrom_attention(query.float(), key.float(), value.float(), landmarks)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), upcast, rtol=tolerance, atol=tolerance)


def test_one_row_of_landmarks_serves_the_whole_batch() -> None:
    query, key, value, landmarks = make_inputs()
    shared = fast_nystrom_attention(query, key, value, landmarks[:1], landmark_bias=torch.zeros(1, 8))
    torch.testing.assert_close(shared, fast_nystrom_attention(query, key, value, landmarks[:1].expand(2, -1)))


def test_gradients_equal_those_of_the_plain_formula() -> None:
    query, key, value, landmarks = make_inputs(dtype=torch.float64)
    bias = torch.rand(2, 8, dtype=torch.float64)
    leaves = [tensor.clone().requires_grad_(True) for tensor in (query, key, value, bias)]
    twins = [tensor.clone().requires_grad_(True) for tensor in (query, key, value, bias)]
    fast_nystrom_attention(*leaves[:3], landmarks, landmark_bias=leaves[3]).square().sum().backward()
    nystrom_attention_reference(*twins[:3], landmarks, twins[3], 0.25, 6, False).square().sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        torch.testing.assert_close(leaf.grad, twin.grad)


def test_compile_and_export_see_one_operator() -> None:
    class Block(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor) -> Tensor:
            return fast_nystrom_attention(query, key, value, landmarks, exact_rows=True)

    inputs = make_inputs()
    expected = Block()(*inputs)
    torch.testing.assert_close(torch.compile(Block(), backend="aot_eager", fullgraph=True)(*inputs), expected)
    program = torch.export.export(Block(), inputs)
    assert [str(node.target) for node in program.graph.nodes].count("fna.attention.default") == 1
    torch.testing.assert_close(program.module()(*inputs), expected)


def test_operator_passes_torchs_own_checks() -> None:
    query, key, value, landmarks = make_inputs(batch=1, heads=1, tokens=10, size=4, count=3)
    torch.library.opcheck(
        torch.ops.fna.attention.default, (query, key, value, landmarks, torch.zeros(1, 3), 0.5, 6, True)
    )
    torch.library.opcheck(torch.ops.fna.attention.default, (query, key, value, landmarks, None, 0.5, 6, False))


def call(**changes: Any) -> Tensor:
    query, key, value, landmarks = make_inputs()
    arguments: dict[str, Any] = {"query": query, "key": key, "value": value, "landmarks": landmarks}
    return fast_nystrom_attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        pytest.param(
            {"query": torch.ones(3, 40, 16)}, InvalidShapeError, r"\[3, 40, 16\].*\[B, H, N, D\]", id="rank 3"
        ),
        pytest.param({"key": torch.ones(2, 3, 41, 16)}, InvalidShapeError, "self-attention", id="other key count"),
        pytest.param({"value": torch.ones(2, 3, 40, 8)}, InvalidShapeError, "value has shape", id="other head size"),
        pytest.param({"key": torch.ones(2, 3, 40, 16).half()}, InvalidDtypeError, "float16.*float32", id="mixed types"),
        pytest.param({"landmarks": torch.ones(2, 8)}, InvalidDtypeError, "int32 or int64", id="float landmarks"),
        pytest.param(
            {"landmarks": torch.ones(2, 40, dtype=torch.bool)},
            InvalidDtypeError,
            "boolean mask",
            id="mask as landmarks",
        ),
        pytest.param(
            {"landmarks": torch.zeros(2, 0).int()}, InvalidLandmarksError, "0 landmarks.*1 to 40", id="no landmark"
        ),
        pytest.param(
            {"landmarks": torch.zeros(2, 41).int()}, InvalidLandmarksError, "41 landmarks", id="more than tokens"
        ),
        pytest.param(
            {"landmarks": torch.full((2, 8), 40).int()},
            InvalidLandmarksError,
            r"index 40.*0\.\.39",
            id="index too large",
        ),
        pytest.param(
            {"landmarks": torch.full((2, 8), -1).int()}, InvalidLandmarksError, "index -1", id="negative index"
        ),
        pytest.param(
            {"landmarks": torch.zeros(3, 8).int()},
            InvalidShapeError,
            r"\[3, 8\].*\[1, S\] or \[2, S\]",
            id="other batch",
        ),
        pytest.param(
            {"landmark_bias": torch.zeros(2, 7)}, InvalidShapeError, "7 columns.*8 landmarks", id="bias too short"
        ),
        pytest.param({"landmark_bias": torch.zeros(2, 8).int()}, InvalidDtypeError, "log", id="integer bias"),
        pytest.param({"attn_mask": torch.ones(40, 40)}, UnsupportedAttentionError, r"\[40, 40\].*unmasked", id="mask"),
        pytest.param({"iterations": 0}, InvalidArgumentError, "at least 1", id="no iteration"),
    ],
)
def test_invalid_arguments_are_named(changes: dict[str, Any], error: type[FnaError], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        call(**changes)
    assert isinstance(caught.value, FnaError)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def softmax_core(size: int, sharpness: float) -> torch.Tensor:
    scores = torch.randn(1, 1, size, size, dtype=torch.float64) + sharpness * torch.eye(size, dtype=torch.float64)
    return torch.softmax(scores, dim=-1)


def residual_left(coefficients: list[tuple[float, float]], eigenvalue: torch.Tensor) -> torch.Tensor:
    """What is left of a residual of 1 along an eigenvector, by the recurrence itself."""
    residual, step = torch.ones_like(eigenvalue), torch.zeros_like(eigenvalue)
    for alpha, beta in coefficients:
        step = beta * step + alpha * residual
        residual = residual - eigenvalue * step
    return residual


@pytest.mark.parametrize(("steps", "low"), [(1, 0.3), (8, 0.05), (10, 0.03), (16, 0.01)])
def test_chebyshev_steps_solve_an_eigenvalue_of_one_and_never_grow_a_residual(steps: int, low: float) -> None:
    coefficients = chebyshev_coefficients(steps, low)
    assert len(coefficients) == steps
    assert residual_left(coefficients, torch.ones((), dtype=torch.float64)).abs() < 1e-12
    left = residual_left(coefficients, torch.linspace(0, 1, 1001, dtype=torch.float64)).abs()
    assert left.max() <= 1 + 1e-12
    above = left[torch.linspace(0, 1, 1001) >= low]
    assert above[0] == pytest.approx(float(above.max()), rel=1e-2)  # equal ripples, the first at `low`


def test_many_chebyshev_steps_reproduce_the_exact_rows() -> None:
    core, exact, value = softmax_core(24, 6.0), torch.randn(1, 1, 24, 5).double(), torch.randn(1, 1, 24, 5).double()
    mixed = chebyshev_core(core, exact, value, 60, 0.02)
    # The mean of the residual is added as it is: rows of A sum to 1, so that it comes through A unchanged.
    torch.testing.assert_close(core @ mixed, exact, rtol=0, atol=1e-4)
    few = chebyshev_core(core, exact, value, 2, 0.02)
    assert (core @ few - exact).norm() > 100 * (core @ mixed - exact).norm()


def test_the_operator_takes_the_cheaper_core_forwards_and_backwards_with_and_without_a_mask() -> None:
    query, key, value = torch.randn(3, 2, 2, 40, 8, dtype=torch.float64).requires_grad_(True)
    landmarks, steps = torch.arange(0, 40, 5)[None].int(), ChebyshevSteps(8, 0.05)
    for mask in (None, torch.arange(40)[None] > 36):
        ours = fast_nystrom_attention(query, key, value, landmarks, chebyshev=steps, key_mask=mask)
        kept = None if mask is None else mask.int()
        scale = 8**-0.5
        expected = nystrom_attention_reference(
            query, key, value, landmarks, None, scale, 6, False, kept, chebyshev=steps
        )
        torch.testing.assert_close(ours, expected)
        plain = fast_nystrom_attention(query, key, value, landmarks, key_mask=mask)
        assert (ours - plain).norm() > 1e-2 * plain.norm()
        weight = torch.randn_like(ours)
        given, wanted = (torch.autograd.grad((out * weight).sum(), [query, key, value]) for out in (ours, expected))
        for gradient, other in zip(given, wanted, strict=True):
            torch.testing.assert_close(gradient, other)


def test_arguments_of_a_program_saved_without_the_core_mean_newton_schulz() -> None:
    query, key, value = torch.randn(3, 1, 2, 20, 8)
    landmarks = torch.arange(0, 20, 4)[None].int()
    out = torch.ops.fna.attention(query, key, value, landmarks, None, 0.3, 6, True)
    torch.testing.assert_close(
        out, nystrom_attention_reference(query, key, value, landmarks, None, 0.3, 6, True), rtol=0, atol=0
    )


@pytest.mark.parametrize(("steps", "low"), [(0, 0.05), (65, 0.05), (8, 0.0), (8, 1.0), (8, float("nan"))])
def test_steps_outside_their_range_are_named(steps: int, low: float) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{steps if low == 0.05 else low}.*needed"):
        ChebyshevSteps(steps, low)


def test_the_default_core_is_newton_schulz_up_to_64_landmarks_and_for_the_published_method() -> None:
    assert default_core(64, "weighted") is None
    assert default_core(128, "published") is None
    assert [default_core(count, "weighted") for count in (65, 96)] == [ChebyshevSteps(10, 0.03)] * 2
    assert [default_core(count, "weighted") for count in (97, 128, 256)] == [ChebyshevSteps(8, 0.05)] * 3


@pytest.mark.parametrize("kind", ["one hub", "all equal", "repeated"])
def test_the_chebyshev_core_is_bounded_where_the_inverse_is_not(kind: str) -> None:
    scores = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    if kind == "one hub":
        scores[..., 3] += 40
    elif kind == "all equal":
        scores[:] = 0
    else:
        scores[..., 16:, :], scores[..., 16:] = scores[..., :16, :].clone(), scores[..., :16].clone()
    core = torch.softmax(scores, dim=-1)
    exact, value = torch.randn(1, 1, 32, 8).double(), torch.randn(1, 1, 32, 8).double()
    residual = exact - core @ value
    mean = residual.mean(-2, keepdim=True)
    correction = chebyshev_core(core, exact, value, 8, 0.05) - value - mean
    assert (correction.norm(dim=-2) <= 14 * (residual - mean).norm(dim=-2)).all()


def test_values_that_the_exact_rows_already_average_come_through_unchanged() -> None:
    core, value = softmax_core(16, 1.0), torch.randn(1, 1, 16, 4).double()
    torch.testing.assert_close(chebyshev_core(core, core @ value + 2.5, value, 8, 0.05), value + 2.5)


def test_every_iterate_is_newton_schulz_with_that_many_iterations() -> None:
    core = torch.softmax(torch.randn(1, 2, 6, 6, dtype=torch.float64), -1)
    exact, identity = torch.randn(1, 2, 6, 3, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    inverse = core.mT / core.sum(-2).amax(-1)[..., None, None]
    expected = []
    for _ in range(4):
        product = core @ inverse
        inverse = inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product))) / 4
        expected.append(inverse @ exact)
    for wanted in ([1, 2, 3, 4], [4], [3, 1]):
        for count, iterate in zip(wanted, newton_schulz_iterates(core, exact, wanted), strict=True):
            torch.testing.assert_close(iterate, expected[count - 1])


def test_known_rows_take_the_place_of_computed_ones() -> None:
    query, key, value = torch.randn(3, 1, 2, 12, 4)
    landmarks, known = torch.tensor([[0, 3, 7]]), torch.randn(1, 2, 3, 4)
    arguments = (query, key, value, landmarks, None, 0.5, [6], True)
    exact = torch.softmax(query[:, :, [0, 3, 7]] @ key.mT * 0.5, -1) @ value
    (computed,) = nystrom_attention_iterates(*arguments)
    torch.testing.assert_close(computed, nystrom_attention_iterates(*arguments, known_rows=exact)[0])
    assert torch.equal(nystrom_attention_iterates(*arguments, known_rows=known)[0][:, :, [0, 3, 7]], known)
