"""Block numbers: reading what people write, writing what is read, refusing what makes no sense."""

from __future__ import annotations

import pytest

from fna.block_numbers import format_layers, parse_blocks, parse_layers
from fna.errors import InvalidArgumentError, InvalidPlanError


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("6-11", [6, 7, 8, 9, 10, 11]),
        ("0-2,9", [0, 1, 2, 9]),
        ("all", list(range(12))),
        ("none", []),
        (None, [6, 7, 8, 9, 10, 11]),
    ],
)
def test_layers_are_block_numbers(text: str | None, blocks: list[int]) -> None:
    assert parse_layers(text, 12) == blocks


@pytest.mark.parametrize("text", ["none", "3", "0-2,5,7-11"])
def test_block_numbers_are_written_as_they_are_read(text: str) -> None:
    assert format_layers(parse_layers(text, 12)) == text


@pytest.mark.parametrize("text", ["", "6-", "a", "11-6", "6-12", "-1", "1;2"])
def test_layers_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidPlanError, match="layers"):
        parse_layers(text, 12)


@pytest.mark.parametrize(("text", "numbers"), [(None, ()), ("0,11", (0, 11)), ("2-4, 0", (0, 2, 3, 4))])
def test_block_lists(text: str | None, numbers: tuple[int, ...]) -> None:
    assert parse_blocks(text) == numbers


def test_block_lists_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="0-2,11"):
        parse_blocks("first")
