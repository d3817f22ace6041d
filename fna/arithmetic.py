"""How many multiplications attention takes: the two products of exact attention against all products of FNA."""

from __future__ import annotations


def exact_products(tokens: int, heads: int, head_size: int) -> int:
    """Multiply-adds of one block's exact attention: scores and their product with the values.

    Args:
        tokens: N.
        heads: H.
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
