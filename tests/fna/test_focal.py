"""Focal attention: what it computes, what its lists hold, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fna
from fna.errors import InvalidArgumentError, InvalidDtypeError, InvalidShapeError
from fna.focal_keys import FAR_BELOW, Levels, focal_keys

LEVELS: Levels = ((1, 0), (2, 2), (4, 4))


def inputs(
    patches: tuple[int, int], prefix: int = 1, batch: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = prefix + patches[0] * patches[1]
    return [torch.randn(batch, 3, tokens, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("patches", [(6, 6), (5, 9), (1, 7)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("hot", [0, 4])
def test_single_patches_at_any_distance_are_exact_attention(patches: tuple[int, int], prefix: int, hot: int) -> None:
    query, key, value = inputs(patches, prefix)
    out = fna.focal_attention(
        query, key, value, patches=patches, prefix_tokens=prefix, tile=4, levels=((1, 0),), hot=hot
    )
    torch.testing.assert_close(out, scaled_dot_product_attention(query, key, value), rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [[0], [3, 17], list(range(20))])
def test_masked_keys_change_nothing(masked: list[int]) -> None:
    query, key, value = inputs((6, 6))
    mask = torch.zeros(1, 37, dtype=torch.bool)
    mask[:, masked] = True
    settings_of = {"patches": (6, 6), "prefix_tokens": 1, "tile": 4, "levels": LEVELS, "hot": 3, "key_mask": mask}
    before = fna.focal_attention(query, key, value, **settings_of)
    key, value = key.clone(), value.clone()
    key[:, :, masked] += 1
    value[:, :, masked] = 1e3
    torch.testing.assert_close(fna.focal_attention(query, key, value, **settings_of), before, rtol=0, atol=1e-9)


def test_with_a_key_mask_single_patches_are_exact_masked_attention() -> None:
    query, key, value = inputs((5, 5))
    mask = torch.arange(26) % 3 == 0
    out = fna.focal_attention(
        query, key, value, patches=(5, 5), prefix_tokens=1, tile=4, levels=((1, 0),), hot=2, key_mask=mask[None]
    )
    torch.testing.assert_close(
        out, scaled_dot_product_attention(query, key, value, attn_mask=~mask[None]), rtol=0, atol=1e-9
    )


def test_a_constant_value_comes_through() -> None:
    query, key, value = inputs((9, 7), prefix=2)
    value = torch.ones_like(value) * 0.7
    out = fna.focal_attention(query, key, value, patches=(9, 7), prefix_tokens=2, tile=4, levels=LEVELS, hot=3)
    torch.testing.assert_close(out, value, rtol=0, atol=1e-12)


def test_images_of_a_batch_do_not_mix() -> None:
    query, key, value = inputs((6, 6), batch=3)
    order = [2, 0, 1]
    settings_of = {"patches": (6, 6), "prefix_tokens": 1, "tile": 4, "levels": LEVELS, "hot": 2}
    out = fna.focal_attention(query, key, value, **settings_of)
    permuted = fna.focal_attention(query[order], key[order], value[order], **settings_of)
    torch.testing.assert_close(permuted, out[order], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_norms_give_no_nan(dtype: torch.dtype) -> None:
    query, key, value = (tensor * 1e4 for tensor in inputs((6, 6), dtype=dtype))
    out = fna.focal_attention(query, key, value.sign(), patches=(6, 6), prefix_tokens=1, tile=4, levels=LEVELS, hot=2)
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_gradients_are_those_of_the_arithmetic() -> None:
    leaves = [tensor[:1, :1].requires_grad_(True) for tensor in inputs((4, 4))]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return fna.focal_attention(query, key, value, patches=(4, 4), prefix_tokens=1, tile=2, levels=LEVELS, hot=2)

    assert torch.autograd.gradcheck(attend, leaves)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    prefix=st.integers(0, 5),
    tile=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([((1, 0),), ((1, 0), (2, 2)), ((1, 0), (2, 1), (4, 3)), ((1, 0), (3, 2), (6, 5), (12, 9))]),
)
def test_every_tile_counts_every_patch_once(
    rows: int, columns: int, prefix: int, tile: int, seed: int, levels: Levels
) -> None:
    lists = focal_keys((rows, columns), prefix, min(tile, max(rows, columns)), levels, seed)
    tokens = prefix + rows * columns
    for keys, bias in zip(lists.keys, lists.bias, strict=True):
        listed = bias > FAR_BELOW
        assert len(set(keys[listed].tolist())) == listed.sum()
        assert np.exp(bias[listed]).sum() == pytest.approx(tokens, rel=1e-5)
    assert sorted(lists.queries.flatten()[lists.places].tolist()) == list(range(prefix, tokens))


def test_near_patches_are_listed_and_far_cells_have_one_patch_each() -> None:
    lists = focal_keys((12, 12), 1, 4, ((1, 0), (2, 2), (4, 4)), seed=7)
    first = lists.bias[0] > FAR_BELOW
    keys, counts = lists.keys[0][first], np.exp(lists.bias[0][first]).round()
    grid = keys[1:] - 1
    row, column = grid // 12, grid % 12
    distance = np.maximum(np.maximum(row - 3, column - 3), 0)
    near = distance <= 2
    assert (counts[1:][near & (distance < 2)] == 1).all()
    assert set(counts[1:].tolist()) == {1.0, 4.0, 16.0}
    assert int((counts == 16).sum()) == 5  # of the 9 cells of 4 x 4, those in the last row and the last column


def test_the_draw_is_the_one_that_is_written_down() -> None:
    """Repeated from the words of fna.focal_keys alone, in Python's integers."""
    whole = 2**64 - 1

    def mix(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & whole
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & whole
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & whole
        return z ^ z >> 31

    lists = focal_keys((12, 12), 1, 4, ((1, 0), (4, 1)), seed=11)
    for tile, far_cells in {0: [2, 5, 6, 7, 8], 4: [], 5: [0, 3, 6]}.items():
        expected = []
        for cell in far_cells:
            ordinal = ((mix(mix(mix(mix(11) ^ tile) ^ 4) ^ cell) >> 32) * 16) >> 32
            expected.append(1 + (cell // 3 * 4 + ordinal // 4) * 12 + cell % 3 * 4 + ordinal % 4)
        assert lists.keys[tile][lists.bias[tile] > 1].tolist() == expected


def test_some_tiles_have_the_lists_that_they_have_among_all() -> None:
    everything, some = (focal_keys((10, 11), 2, 4, LEVELS, seed=5, tiles=tiles) for tiles in (None, (1, 7)))
    assert everything.queries[[1, 7]].tolist() == some.queries.tolist()
    for row, tile in enumerate((1, 7)):
        listed, also = (lists.bias[at] > FAR_BELOW for lists, at in ((some, row), (everything, tile)))
        assert some.keys[row][listed].tolist() == everything.keys[tile][also].tolist()
        assert some.bias[row][listed].tolist() == everything.bias[tile][also].tolist()


def test_masked_patches_are_never_drawn() -> None:
    masked = tuple(range(1, 145, 2))
    for seed in range(5):
        lists = focal_keys((12, 12), 1, 4, LEVELS, seed, masked)
        listed = lists.keys[lists.bias > FAR_BELOW]
        assert not set(listed.tolist()) & set(masked)
        assert np.exp(lists.bias).sum(axis=1).round().tolist() == [73.0] * 9


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"levels": ((2, 0),)}, "first must be"),
        ({"levels": ((1, 0), (3, 2), (4, 3))}, "multiple of the one before"),
        ({"levels": ((1, 0), (2, 4), (4, 2))}, "gaps must ascend"),
        ({"levels": ((1, 0), (2, 0))}, "gaps must ascend"),
        ({"tile": 7}, "use 1 to 6"),
        ({"hot": 37}, "use 0 to 36"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"patches": (6, 5)}, "there are 37 tokens"),
        ({"prefix_tokens": 2}, "there are 37 tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changed: dict[str, object], message: str) -> None:
    query, key, value = inputs((6, 6))
    with pytest.raises(InvalidArgumentError, match=message):
        fna.focal_attention(query, key, value, **{"patches": (6, 6), "prefix_tokens": 1, "tile": 4, **changed})


def test_tensors_that_do_not_match_are_refused() -> None:
    query, key, value = inputs((4, 4))
    with pytest.raises(InvalidShapeError, match="key has shape"):
        fna.focal_attention(query, key[:1], value, patches=(4, 4), prefix_tokens=1, tile=4)
    with pytest.raises(InvalidDtypeError, match="value is"):
        fna.focal_attention(query, key, value.float(), patches=(4, 4), prefix_tokens=1, tile=4)
    with pytest.raises(InvalidShapeError, match="key_mask has shape"):
        fna.focal_attention(
            query, key, value, patches=(4, 4), prefix_tokens=1, tile=4, key_mask=torch.zeros(1, 5, dtype=torch.bool)
        )
