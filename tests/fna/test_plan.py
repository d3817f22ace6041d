"""Plans: reading, writing, and refusing what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from fna.errors import InputFileError, InvalidPlanError
from fna.plan import BlockPlan, Plan, load_plan, parse_layers, parse_plan, uniform_plan


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


@pytest.mark.parametrize("text", ["", "6-", "a", "11-6", "6-12", "-1", "1;2"])
def test_layers_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidPlanError, match="layers"):
        parse_layers(text, 12)


def test_a_plan_survives_being_written_and_read(tmp_path: Path) -> None:
    plan = Plan(
        num_blocks=12,
        blocks=(BlockPlan(block=2, landmarks=32, sampler="fps", feature="query"), BlockPlan(block=7, landmarks=64)),
        method="published",
        made_from={"images": 8},
    )
    path = tmp_path / "plan.json"
    path.write_text(plan.dump_json())
    assert load_plan(path) == plan


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"num_blocks": 12, "colour": 1}', "colour"),
        ('{"num_blocks": 12, "version": 2}', "version"),
        ('{"num_blocks": 12, "blocks": [{"block": 1, "landmarks": 0}]}', "blocks.0.landmarks"),
        ('{"num_blocks": 12, "blocks": [{"block": 12, "landmarks": 8}]}', "blocks 0 to 11"),
        ('{"num_blocks": 12, "blocks": [{"block": 3, "landmarks": 8}, {"block": 3, "landmarks": 8}]}', "once each"),
        ('{"num_blocks": 12, "blocks": [{"block": 3, "landmarks": 8, "sampler": "best"}]}', "sampler"),
    ],
)
def test_a_malformed_plan_names_the_key(text: str, said: str) -> None:
    with pytest.raises(InvalidPlanError, match=said) as caught:
        parse_plan(text)
    assert "\n" not in str(caught.value)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="nowhere.json"):
        load_plan(tmp_path / "nowhere.json")


def test_uniform_plans_refuse_values_out_of_range() -> None:
    with pytest.raises(InvalidPlanError, match="landmarks"):
        uniform_plan(12, landmarks=0)
