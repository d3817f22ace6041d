"""How much each focal candidate would hurt, block by block, in the same terms as FNA's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fna.focal import focal_attention_reference
from fna.focal_keys import FocalKeys, Levels, focal_keys
from fna.validate.planning.candidates import FocalCandidate
from fna.validate.planning.measure import Moments
from fna.validate.planning.subject import BlockView, Layout

SAMPLED_QUERIES = 768
"""About so many patches of an image, in whole tiles, are computed; the errors of tiles are drawn independently."""


def measure_focal(
    view: BlockView, layout: Layout, candidates: Sequence[FocalCandidate]
) -> dict[FocalCandidate, Moments]:
    """Return the moments of every focal candidate for one block of one image: nothing to fit, only an error and its effect.

    Both are taken over some of the tiles, and scaled to all of them.
    """
    if not candidates:
        return {}
    assert layout.patches is not None
    moments = {}
    prefix, patches = layout.prefix_tokens, layout.patches
    for tile in dict.fromkeys(candidate.tile for candidate in candidates):
        of_tile = {
            candidate: _some_tiles(patches, prefix, tile, candidate.levels, candidate.plan(view.number).seed)
            for candidate in candidates
            if candidate.tile == tile
        }
        tokens = torch.from_numpy(np.unique(next(iter(of_tile.values())).queries)).long()
        exact, lift = view.exact[0, :, tokens], (layout.tokens - prefix) / len(tokens)
        gradients = None if view.gradients is None else view.gradients[:, :, tokens]
        for candidate, lists in of_tile.items():
            out = focal_attention_reference(
                view.query, view.key, view.value, *lists.tensors(), None, prefix, candidate.hot, view.scale
            )
            moments[candidate] = _moments(out[0, :, tokens] - exact, view, gradients, lift)
    return moments


@lru_cache(maxsize=1024)  # of all blocks and candidates, for the next image
def _some_tiles(patches: tuple[int, int], prefix_tokens: int, tile: int, levels: Levels, seed: int) -> FocalKeys:
    """Lists of some of the tiles, in no pattern; the places of patches in other tiles mean nothing."""
    rows, columns = patches
    count, needed = -(-rows // tile) * -(-columns // tile), -(-SAMPLED_QUERIES // tile**2)
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:needed])
    return focal_keys(patches, prefix_tokens, tile, levels, seed, tiles=tuple(chosen.tolist()))


def _moments(
    error: Tensor,  # [H, n, D]
    view: BlockView,
    gradients: Tensor | None,  # [K, H, n, D]
    lift: float,
) -> Moments:
    heads, tokens, _ = error.shape
    turned = error @ view.root
    # what all rows share weighs more
    common = (view.coherence - 1).clamp(min=0) / tokens
    energy = turned.square().sum((1, 2)) + common * turned.sum(1).square().sum(1)
    effect = torch.zeros(heads, 2, 2)
    if gradients is not None:
        effect[:, 1, 1] = torch.einsum("khnd,hnd->kh", gradients, error).square().mean(0)
    zero = torch.zeros(heads)
    return Moments(torch.zeros(heads, 1, 1), torch.zeros(heads, 1), lift * energy, zero, lift * effect)
