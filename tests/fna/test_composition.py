"""Some heads FNA, some exact, and what a correction does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fna.composition import compose_heads, correct
from fna.errors import InvalidArgumentError
from fna.plan import Correction
from fna.samplers.common.spacing import patch_grid
from fna.samplers.lattice import lattice_landmarks


@pytest.mark.parametrize("heads", [(0,), (1, 2), (0, 3), (0, 2, 3), (0, 1, 2, 3), None])
def test_each_head_goes_where_the_plan_sends_it(heads: tuple[int, ...] | None) -> None:
    query = torch.randn(2, 4, 5, 3)
    out = compose_heads(query, query, query, heads, lambda q, k, v: q * 0 + 1, lambda q, k, v: q * 0 - 1)
    expected = [1.0 if heads is None or head in heads else -1.0 for head in range(4)]
    assert out[:, :, 0, 0].tolist() == [expected, expected]


def test_exact_heads_keep_their_own_operands() -> None:
    query = torch.randn(1, 4, 5, 3)
    out = compose_heads(query, query, query, (1, 3), lambda q, k, v: q, lambda q, k, v: q)
    assert torch.equal(out, query)


def test_a_head_that_is_not_there_is_refused() -> None:
    query = torch.randn(1, 4, 5, 3)
    with pytest.raises(InvalidArgumentError, match="head 4, but the block has heads 0 to 3"):
        compose_heads(query, query, query, (4,), lambda q, k, v: q, lambda q, k, v: q)


def reference(
    out: Tensor, value: Tensor, landmarks: Tensor, correction: Correction, prefix: int, rows: int, columns: int
) -> Tensor:
    """The correction token by token, as its definition says."""
    result = out.clone()
    reach = correction.size // 2
    for token in range(prefix, out.shape[2]):
        if token in landmarks[0].tolist():
            continue
        row, column = divmod(token - prefix, columns)
        for head, (kernel, gain) in enumerate(zip(correction.kernels, correction.gains, strict=True)):
            total = gain * out[:, head, token]
            for tap, weight in enumerate(kernel):
                down, right = tap // correction.size - reach, tap % correction.size - reach
                if 0 <= row + down < rows and 0 <= column + right < columns:
                    total = total + weight * value[:, head, prefix + (row + down) * columns + column + right]
            result[:, head, token] = total
    return result


@pytest.mark.parametrize(("prefix", "size"), [(0, 1), (1, 3), (2, 5)])
def test_a_correction_is_a_kernel_over_the_grid_of_patches(prefix: int, size: int) -> None:
    tokens = prefix + 4 * 6
    out, value = torch.randn(2, 2, 2, tokens, 3)
    kernels = torch.randn(2, size * size).tolist()
    correction = Correction(size=size, kernels=tuple(map(tuple, kernels)), gains=(0.5, 1.5))
    landmarks = lattice_landmarks(tokens, 5, prefix, (4, 6))
    given = correct(out, value, landmarks, correction, prefix_tokens=prefix, patches=(4, 6), exact_rows=True)
    torch.testing.assert_close(given, reference(out, value, landmarks, correction, prefix, 4, 6))


def test_patches_that_do_not_add_up_are_refused() -> None:
    assert patch_grid(17, 1, None) == (4, 4)
    with pytest.raises(InvalidArgumentError, match="no square number"):
        patch_grid(25, 1, None)
    with pytest.raises(InvalidArgumentError, match="5 x 5 patches were given"):
        patch_grid(25, 1, (5, 5))
