"""Numbers of attention blocks as people write them: `6-11`, `0-2,6-11`, `all`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fna.errors import InvalidArgumentError, InvalidPlanError


def parse_layers(layers: str | None, num_blocks: int) -> list[int]:
    """Turn `6-11`, `0-2,6-11`, `all` or `none` into block numbers; None is the later half, as in the paper's experiments.

    Raises:
        InvalidPlanError: for other text, or blocks that the model does not have.
    """
    if layers is None:
        return list(range(num_blocks // 2, num_blocks))
    text = layers.strip()
    if text in ("all", "none"):
        return list(range(num_blocks)) if text == "all" else []
    spans = _parse_spans(text)
    if spans is None:
        raise InvalidPlanError(
            f"layers {layers!r} cannot be read; write block numbers as in '6-11' or '0-2,6-11', or 'all', or 'none'"
        )
    for first, last in spans:
        if first > last or last >= num_blocks:
            raise InvalidPlanError(
                f"layers {layers!r} name block {max(first, last)}, but the model has blocks 0 to {num_blocks - 1}"
            )
    return sorted({number for first, last in spans for number in range(first, last + 1)})


def parse_blocks(text: str | None) -> tuple[int, ...]:
    """Turn `0,11` or `0-2,11` into block numbers of a model that is not known yet; None or nothing is none.

    Raises:
        InvalidArgumentError: for other text.
    """
    spans = _parse_spans(text) if text else []
    if spans is None:
        raise InvalidArgumentError(f"blocks {text!r} cannot be read; write numbers as in 0,11 or 0-2,11")
    return tuple(sorted({number for first, last in spans for number in range(first, last + 1)}))


def _parse_spans(text: str) -> list[tuple[int, int]] | None:
    """First and last number of each part of `0-2,11`; None for other text."""
    matches = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in text.split(",")]
    return [(int(match[1]), int(match[2] or match[1])) for match in matches if match] if all(matches) else None


def format_layers(numbers: Iterable[int]) -> str:
    """Write block numbers as `parse_layers` reads them: `0-2,6-11`, or `none`."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans) or "none"
