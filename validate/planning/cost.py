"""What a block costs: its products, or its predicted time on a device."""

from __future__ import annotations

from typing import Protocol

from fna.arithmetic import correction_products, exact_products, nystrom_products
from fna.validate.planning.measure import Candidate
from fna.validate.planning.subject import Layout


class CostModel(Protocol):
    """The cost of one block's attention; `unit` says of what."""

    unit: str

    def exact(self, heads: int) -> float:
        """Exact attention of so many heads."""

    def block(self, candidate: Candidate, heads: int, kernel: int) -> float:
        """FNA on `heads` of the heads, corrected by a kernel of that size (0: not corrected), the others exact."""


class ProductCost:
    """Multiply-adds."""

    unit = "products"

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def exact(self, heads: int) -> float:
        """See `CostModel.exact`."""
        return float(exact_products(self.layout.tokens, heads, self.layout.head_size))

    def block(self, candidate: Candidate, heads: int, kernel: int) -> float:
        """See `CostModel.block`."""
        tokens, size = self.layout.tokens, self.layout.head_size
        total = nystrom_products(tokens, candidate.landmarks, heads, size, candidate.iterations)
        if kernel:
            total += correction_products(tokens, heads, size, kernel)
        return total + self.exact(self.layout.heads - heads)
