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


TOWERS = {"patch_encoder": "0-3", "image_encoder": "4,6", "image_head": "5,7"}


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("patch_encoder:1-2", [1, 2]),
        ("patch:0,2,image_encoder:1,image_head:0-1", [0, 2, 5, 6, 7]),
        ("patch:1-2", [1, 2]),
        ("image_head:1", [7]),
        ("patch:0;image_encoder:all", [0, 4, 6]),
        (None, [2, 3, 6, 7]),
        ("all", list(range(8))),
        ("none", []),
    ],
)
def test_blocks_of_towers_are_numbered_in_each(layers: str | None, numbers: list[int]) -> None:
    assert parse_layers(layers, 8, TOWERS) == numbers


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (
            "0-3",
            "name no tower of the model, which has 3: patch_encoder, image_encoder, image_head; write patch_encoder:0-2",
        ),
        ("image:0", "name no tower"),
        ("depth:0", "name no tower"),
        ("image_head:2", "name block 2, but its tower image_head has blocks 0 to 1"),
        ("image_head:x", "cannot be read"),
    ],
)
def test_a_tower_or_block_that_there_is_not_is_refused(layers: str, said: str) -> None:
    with pytest.raises(InvalidPlanError, match=said):
        parse_layers(layers, 8, TOWERS)
