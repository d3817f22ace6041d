"""How many multiplications attention takes: the two products of exact attention against all products of FNA."""

from __future__ import annotations

from fna.plan import BlockPlan, Plan, Sampler, SharingKey


def exact_products(tokens: int, heads: int, head_size: int) -> int:
    """Multiply-adds of one block's exact attention: scores and their product with the values.

    Args:
        tokens: N.
        heads: H, those of them that are exact.
        head_size: D.
    """
    return 2 * heads * tokens * tokens * head_size


def nystrom_products(tokens: int, landmarks: int, heads: int, head_size: int, iterations: int = 6) -> int:
    """Multiply-adds of one block's FNA: A, Bv, Newton-Schulz as `fna.attention.apply_newton_schulz` does it, the output.

    Args:
        tokens: N.
        landmarks: S.
        heads: H, those of them that are FNA.
        head_size: D.
        iterations: Newton-Schulz iterations, the last one applied to Bv.
    """
    core = landmarks * landmarks * head_size
    exact_rows = 2 * landmarks * tokens * head_size
    newton = (4 * (iterations - 1) + 1) * landmarks**3 + 4 * landmarks * landmarks * head_size
    output = 2 * tokens * landmarks * head_size
    return heads * (core + exact_rows + newton + output)


def correction_products(tokens: int, heads: int, head_size: int, kernel: int) -> int:
    """Multiply-adds of a correction: its kernel and its gain on every value of its heads."""
    return heads * tokens * head_size * (kernel * kernel + 1)


def sampling_products(sampler: Sampler, tokens: int, landmarks: int, channels: int) -> int:
    """Multiply-adds of choosing landmarks once: squared distances of every token to each (fps), squared norms (norm-grid).

    Args:
        sampler: how; those that do not look at the image take none.
        tokens: N.
        landmarks: S.
        channels: C of the features.
    """
    return {"fps": landmarks, "norm-grid": 1}.get(sampler, 0) * tokens * channels


def block_products(entry: BlockPlan | None, plan: Plan, tokens: int, heads: int, head_size: int) -> int:
    """Multiply-adds of one block's attention by a plan; None is an exact block. Choosing landmarks is counted by `saved_part`."""
    if entry is None:
        return exact_products(tokens, heads, head_size)
    count = heads if entry.heads is None else len(entry.heads)
    total = nystrom_products(tokens, entry.landmarks, count, head_size, plan.iterations_of(entry))
    if entry.correction is not None:
        total += correction_products(tokens, count, head_size, entry.correction.size)
    return total + exact_products(tokens, heads - count, head_size)


def saved_part(plan: Plan, tokens: int, heads: int, head_size: int) -> float:
    """Part of the whole model's attention products that a plan saves; blocks that stay exact count in full.

    Choosing landmarks counts in every block that chooses anew, and once for blocks that share them.
    """
    chosen: set[SharingKey] = set()
    taken = 0
    for block in range(plan.num_blocks):
        entry = plan.find(block)
        taken += block_products(entry, plan, tokens, heads, head_size)
        if entry is not None and (plan.resamples(entry) or plan.sharing_key(entry) not in chosen):
            chosen.add(plan.sharing_key(entry))
            taken += sampling_products(entry.sampler, tokens, entry.landmarks, heads * head_size)
    return 1 - taken / (plan.num_blocks * exact_products(tokens, heads, head_size))
