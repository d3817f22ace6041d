"""The table of tolerances, and what the command line may say instead."""

from __future__ import annotations

import pytest

from fna.errors import InvalidArgumentError
from fna.validate.budget.tolerances import STEPS, TOLERANCES, find_tolerance, parse_tolerances


def test_the_table_has_every_step_and_precision() -> None:
    assert set(TOLERANCES) == set(STEPS)
    assert {tuple(row) for row in TOLERANCES.values()} == {("fp32", "fp16", "bf16", "int8", "fp8")}


def test_an_override_takes_the_tables_place() -> None:
    assert find_tolerance("export", "fp32", {}) == 1e-3
    assert find_tolerance("export", "fp32", {"export": 0.5}) == 0.5
    assert find_tolerance("approximation", "fp32", {}) is None


def test_texts_name_a_step_or_mean_export() -> None:
    assert parse_tolerances(["approximation=0.1", "1e-4"]) == {"approximation": 0.1, "export": 1e-4}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "speed=1",
            "'speed=1' names no step; write STEP=NUMBER, STEP one of approximation, export, precision, processor, plugin, engine",
        ),
        ("export=small", "'export=small' cannot be read; a positive number is needed, as in export=1e-3"),
        ("export=0", "a positive number"),
        ("engine=inf", "a positive number"),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        parse_tolerances([text])
