"""Which landmarks a patched model uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

import fna.patching.attention


@contextmanager
def seen_landmarks() -> Iterator[list[Tensor]]:
    """The landmarks of every FNA block that runs, in order."""
    seen: list[Tensor] = []
    original = fna.patching.attention.fast_nystrom_attention

    def look(query: Tensor, key: Tensor, value: Tensor, landmarks: Tensor, **settings: Any) -> Tensor:
        seen.append(landmarks)
        return original(query, key, value, landmarks, **settings)

    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(fna.patching.attention, "fast_nystrom_attention", look)
        yield seen
