"""How many threads PyTorch takes for one operator, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Give PyTorch one thread within the block, if that is wanted.

    Small products gain nothing from threads, and lose much where the machine is shared.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
