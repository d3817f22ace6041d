"""Every formula of operations and bytes: multiply-adds and memory traffic of exact attention, of FNA, and of a whole plan.

A product is one multiply-add, `OPERATIONS_PER_PRODUCT` operations. Softmax and other elementwise work, a few percent, is not
counted. Sizes: N `tokens`, S `landmarks`, H `heads` (those that the formula is about), D `head_size`, C `channels`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from fna.chebyshev import ChebyshevSteps
from fna.plan import FocalBlockPlan, Plan, SharingKey
from fna.samplers import find_sampler
from fna.samplers.common.spacing import patch_grid

if TYPE_CHECKING:
    from fna.focal_keys import FocalKeys

OPERATIONS_PER_PRODUCT = 2


def exact_products(tokens: int, heads: int, head_size: int) -> int:
    """Products of exact attention: scores, and their product with the values."""
    return 2 * heads * tokens * tokens * head_size


def landmark_row_products(tokens: int, landmarks: int, heads: int, head_size: int) -> int:
    """Products between N tokens and S landmarks: scores, and their product with values. FNA has two such, Bv and the output."""
    return 2 * heads * tokens * landmarks * head_size


def newton_schulz_products(landmarks: int, heads: int, iterations: int) -> int:
    """Products of size S x S x S: all of the iterations but the last, and W of the last, which is applied to Bv."""
    return heads * (4 * (iterations - 1) + 1) * landmarks**3


def last_iteration_products(landmarks: int, heads: int, head_size: int) -> int:
    """Products of size S x S x D by which the last iteration is applied to Bv."""
    return 4 * heads * landmarks * landmarks * head_size


def chebyshev_products(landmarks: int, heads: int, head_size: int, steps: int) -> int:
    """Products of `fna.attention.chebyshev_core`: A^T A, and S x S times S x D for A, for A^T, and for every step but the first."""
    return heads * landmarks * landmarks * (landmarks + (steps + 1) * head_size)


def nystrom_products(
    tokens: int, landmarks: int, heads: int, head_size: int, iterations: int, chebyshev: ChebyshevSteps | None = None
) -> int:
    """Products of FNA: A, Bv, the core as `fna.attention` does it (`iterations` of Newton-Schulz without `chebyshev`), the output."""
    matrix = heads * landmarks * landmarks * head_size
    rows = 2 * landmark_row_products(tokens, landmarks, heads, head_size)
    if chebyshev is not None:
        return matrix + rows + chebyshev_products(landmarks, heads, head_size, chebyshev.steps)
    last = last_iteration_products(landmarks, heads, head_size)
    return matrix + rows + newton_schulz_products(landmarks, heads, iterations) + last


def focal_products(
    pairs: int, queries: int, tokens: int, prefix_tokens: int, hot: int, heads: int, head_size: int
) -> int:
    """Products of focal attention: every tile's queries with its keys, prefix tokens with all, scores of the hot keys.

    Args:
        pairs: queries times keys, summed over the tiles; padding counts nothing.
        queries: patches, which are the tiles' queries.
        tokens: N.
        prefix_tokens: class and register tokens.
        hot: keys that are exact for all tiles.
        heads: H.
        head_size: D.
    """
    scored = pairs + queries * hot + prefix_tokens * tokens
    return heads * head_size * (2 * scored + (queries if hot else 0))


def focal_block_products(
    focal: FocalBlockPlan, patches: tuple[int, int], prefix_tokens: int, heads: int, head_size: int
) -> int:
    """Products of one block of focal attention over rows and columns of `patches`, as `focal_products` counts them."""
    lists = _focal_lists(focal, patches, prefix_tokens)
    tokens = prefix_tokens + patches[0] * patches[1]
    return focal_products(*_listed_pairs(lists), tokens, prefix_tokens, focal.hot, heads, head_size)


def focal_bytes(
    pairs: int,
    queries: int,
    listed: int,
    tokens: int,
    prefix_tokens: int,
    hot: int,
    heads: int,
    head_size: int,
    element: int,
) -> int:
    """Bytes of focal attention, counted as `exact_bytes`: `listed` keys and values are gathered for the tiles, and written."""
    scores = pairs + queries * hot + prefix_tokens * tokens
    gathered = 4 * heads * listed * head_size * element
    return fused_bytes(tokens, heads, head_size, element) + gathered + 4 * heads * scores * element


def correction_products(tokens: int, heads: int, head_size: int, kernel: int) -> int:
    """Products of a correction: its kernel of `kernel` x `kernel` and its gain on every value of its heads."""
    return heads * tokens * head_size * (kernel * kernel + 1)


def sampling_products(sampler: str, tokens: int, landmarks: int, channels: int) -> int:
    """Products of choosing landmarks once: one for each number that the sampler reads; none where it does not look at the image."""
    return find_sampler(sampler).passes(landmarks) * tokens * channels


def token_bytes(tokens: int, heads: int, head_size: int, element: int) -> int:
    """Bytes of one tensor `[1, H, N, D]` whose numbers take `element` bytes."""
    return heads * tokens * head_size * element


def fused_bytes(tokens: int, heads: int, head_size: int, element: int) -> int:
    """Bytes that any attention moves at the least: query, key, value and output once."""
    return 4 * token_bytes(tokens, heads, head_size, element)


def exact_bytes(tokens: int, heads: int, head_size: int, element: int) -> int:
    """Bytes of exact attention that writes scores and weights out and reads them again, besides its four token tensors."""
    return fused_bytes(tokens, heads, head_size, element) + 4 * heads * tokens * tokens * element


def nystrom_bytes(tokens: int, landmarks: int, heads: int, head_size: int, element: int) -> int:
    """Bytes of FNA, counted as `exact_bytes`: query and key are read twice, and it has two `[N, S]` matrices of scores."""
    return 6 * token_bytes(tokens, heads, head_size, element) + 8 * heads * tokens * landmarks * element


def correction_bytes(tokens: int, heads: int, head_size: int, element: int) -> int:
    """Bytes of a correction: values in, their convolution out and in, FNA's output in and corrected out, exact rows in."""
    return 6 * token_bytes(tokens, heads, head_size, element)


def head_split_bytes(tokens: int, heads: int, head_size: int, element: int) -> int:
    """Bytes of taking all H heads of query, key and value apart and of joining the results: four tensors read and written."""
    return 8 * token_bytes(tokens, heads, head_size, element)


def block_products(plan: Plan, block: int, tokens: int, heads: int, head_size: int) -> int:
    """Products of one block's attention by a plan. Choosing landmarks is counted by `plan_products`."""
    focal = plan.find_focal(block)
    if focal is not None:
        return focal_block_products(focal, *_patches_and_prefix(plan, tokens), heads, head_size)
    planned = plan.find(block)
    if planned is None:
        return exact_products(tokens, heads, head_size)
    count = heads if planned.heads is None else len(planned.heads)
    core = plan.iterations_of(planned), plan.chebyshev_of(planned)
    total = nystrom_products(tokens, planned.landmarks, count, head_size, *core)
    if planned.correction is not None:
        total += correction_products(tokens, count, head_size, planned.correction.size)
    return total + exact_products(tokens, heads - count, head_size)


def block_bytes(plan: Plan, block: int, tokens: int, heads: int, head_size: int, element: int) -> int:
    """Bytes of one block's attention by a plan, scores and weights written out."""
    focal = plan.find_focal(block)
    if focal is not None:
        patches, prefix = _patches_and_prefix(plan, tokens)
        lists = _focal_lists(focal, patches, prefix)
        return focal_bytes(*_listed_pairs(lists), lists.keys.size, tokens, prefix, focal.hot, heads, head_size, element)
    planned = plan.find(block)
    if planned is None:
        return exact_bytes(tokens, heads, head_size, element)
    count = heads if planned.heads is None else len(planned.heads)
    total = nystrom_bytes(tokens, planned.landmarks, count, head_size, element)
    if planned.correction is not None:
        total += correction_bytes(tokens, count, head_size, element)
    if count < heads:
        total += head_split_bytes(tokens, heads, head_size, element)
        total += exact_bytes(tokens, heads - count, head_size, element)
    return total


def plan_products(plan: Plan, tokens: int, heads: int, head_size: int, blocks: Collection[int] | None = None) -> int:
    """Products of the attention of some blocks by a plan, of all where none are named; those that stay exact count in full.

    Choosing landmarks counts in every block that chooses anew, and once for blocks that share them.
    """
    chosen: set[SharingKey] = set()
    taken = 0
    for block in range(plan.num_blocks) if blocks is None else blocks:
        taken += block_products(plan, block, tokens, heads, head_size)
        entry = plan.find(block)
        if entry is not None and (plan.resamples(entry) or plan.sharing_key(entry) not in chosen):
            chosen.add(plan.sharing_key(entry))
            taken += sampling_products(entry.sampler, tokens, entry.landmarks, heads * head_size)
    return taken


def plan_bytes(plan: Plan, tokens: int, heads: int, head_size: int, element: int) -> int:
    """Bytes of the whole model's attention by a plan, scores and weights written out."""
    return sum(block_bytes(plan, block, tokens, heads, head_size, element) for block in range(plan.num_blocks))


def saved_part(plan: Plan, tokens: int, heads: int, head_size: int, blocks: Collection[int] | None = None) -> float:
    """Part of the attention products of some blocks that a plan saves, of all where none are named."""
    exact = (plan.num_blocks if blocks is None else len(blocks)) * exact_products(tokens, heads, head_size)
    return 1 - plan_products(plan, tokens, heads, head_size, blocks) / exact


def _patches_and_prefix(plan: Plan, tokens: int) -> tuple[tuple[int, int], int]:
    """The grid of patches, and the number of prefix tokens."""
    prefix = plan.prefix_tokens
    if prefix is None:
        rows, columns = plan.patches or (math.isqrt(tokens), math.isqrt(tokens))
        prefix = tokens - rows * columns
    return patch_grid(tokens, prefix, plan.patches), prefix


def _focal_lists(focal: FocalBlockPlan, patches: tuple[int, int], prefix_tokens: int) -> FocalKeys:
    from fna.focal_keys import focal_keys  # not above: it needs PyTorch

    return focal_keys(patches, prefix_tokens, focal.tile, focal.levels, focal.seed)


def _listed_pairs(lists: FocalKeys) -> tuple[int, int]:
    """Queries times keys, summed over the tiles, and the number of queries; padding is left out."""
    return int((lists.query_counts * lists.key_counts).sum()), int(lists.places.shape[0])
