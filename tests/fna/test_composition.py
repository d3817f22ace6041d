"""What a correction does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fna.composition import correct
from fna.correction import Correction
from fna.errors import InvalidArgumentError
from fna.samplers.common.spacing import patch_grid
from fna.samplers.lattice import lattice_landmarks


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
