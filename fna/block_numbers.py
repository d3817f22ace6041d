"""Numbers of attention blocks as people write them: `6-11`, `0-2,6-11`, `all`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from fna.errors import InvalidArgumentError, InvalidPlanError


def parse_layers(layers: str | None, num_blocks: int, towers: Mapping[str, str] | None = None) -> list[int]:
    """Turn `6-11`, `0-2,6-11`, `all` or `none` into block numbers; None is the later half, as in the paper's experiments.

    In a model of several towers blocks are numbered tower by tower, and text names them: `vision:6-11`, `vision:0-2,depth:all`.
    The later half is then each tower's.

    Args:
        layers: the text.
        num_blocks: of the model, all towers together.
        towers: the block numbers, in the whole model, of each tower by its name; none for a model of one tower.

    Raises:
        InvalidPlanError: for other text, or blocks or towers that the model does not have.
    """
    if not towers:
        return _parse_in_one(layers, num_blocks)
    text = layers.strip() if layers is not None else None
    if text == "none":
        return []
    places = {name: _parse_in_one(numbers, num_blocks) for name, numbers in towers.items()}
    parts = [(name, text) for name in towers] if text in (None, "all") else _split_towers(str(text), list(towers))
    chosen = [[places[name][number] for number in _parse_in_one(part, len(places[name]), name)] for name, part in parts]
    return sorted({number for numbers in chosen for number in numbers})


def _split_towers(text: str, names: list[str]) -> list[tuple[str, str]]:
    """Towers and their blocks in `vision:0-2,depth:all`; `;` may part them. The start of a name will do where no other has it."""
    parts = []
    for part in re.split(r";|,(?=[^,;:]*:)", text):
        tower, colon, blocks = part.partition(":")
        meant = [name for name in names if name == tower.strip()] or [
            name for name in names if tower.strip() and name.startswith(tower.strip())
        ]
        if not colon or len(meant) != 1:
            raise InvalidPlanError(
                f"layers {text!r} name no tower of the model, which has {len(names)}: {', '.join(names)}; write {names[0]}:0-2"
            )
        parts.append((meant[0], blocks))
    return parts


def _parse_in_one(layers: str | None, num_blocks: int, tower: str | None = None) -> list[int]:
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
    owner = "the model" if tower is None else f"its tower {tower}"
    for first, last in spans:
        if first > last or last >= num_blocks:
            raise InvalidPlanError(
                f"layers {layers!r} name block {max(first, last)}, but {owner} has blocks 0 to {num_blocks - 1}"
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
