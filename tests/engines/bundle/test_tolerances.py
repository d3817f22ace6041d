"""How close outputs have to be: by precision, and in 8 bits by what an output is for."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fna.engines.bundle.tolerances import (
    TASK_TOLERANCES,
    TOLERANCES,
    TaskTolerance,
    failures,
    find_task,
    measure,
    task_tolerances,
    tolerance_of,
)
from fna.export.metadata import FileMetadata
from fna.plan import uniform_plan

from ..conftest import ROOT

TOKENS = np.random.default_rng(0).standard_normal((2, 40, 8)).astype(np.float32)
SCORES = np.array([[0, 1, 5, 4.9], [3, 0, 1, 2]], np.float32)


def metadata(**values: object) -> FileMetadata:
    return FileMetadata(plan=uniform_plan(2, layers="all", landmarks=6), source="x", origin="trace", **values)


@pytest.mark.parametrize(
    ("name", "shape", "task"),
    [
        ("hidden", (1, 17, 8), "tokens"),
        ("other", (1, 17, 8), None),
        ("depth", (1, 56, 56), "map"),
        ("mask", (1, 1, 56, 56), "map"),
        ("planes", (1, 3, 56, 56), None),
        ("logits", (1, 10), "classes"),
        ("image_embeds", (1, 10), "vector"),
    ],
)
def test_the_task_of_an_output_is_what_its_file_says_or_its_shape(
    name: str, shape: tuple[int, ...], task: str | None
) -> None:
    assert find_task(metadata(token_outputs=("hidden",), map_outputs=("depth",)), name, shape) == task


def test_a_grafted_files_tokens_are_told_by_its_attention() -> None:
    found = metadata(attention_table=[{"tokens": 17}])
    assert (find_task(found, "out", (1, 17, 8)), find_task(found, "out", (1, 16, 8))) == ("tokens", None)


def test_only_8_bits_are_held_to_tasks() -> None:
    outputs = {"tokens": TOKENS, "logits": SCORES, "boxes": np.zeros((1, 5, 4), np.float32)}
    int8 = metadata(token_outputs=("tokens",), quantized="int8+fp8", precision="fp16")
    assert task_tolerances(int8, outputs) == {
        "tokens": TASK_TOLERANCES["int8"]["tokens"],
        "logits": TASK_TOLERANCES["int8"]["classes"],
    }
    assert tolerance_of(int8, "fp16") == TOLERANCES["int8"]
    assert task_tolerances(metadata(token_outputs=("tokens",)), outputs) == {}
    assert tolerance_of(metadata(), "fp16") == TOLERANCES["fp16"]


def test_rows_are_measured_one_by_one() -> None:
    """Two tokens of 80 that point elsewhere: the whole hardly notices, the 5th percentile does once there are four."""
    wrong = TOKENS.copy()
    wrong[0, :2] *= -1
    found = measure(TOKENS, wrong)
    assert found["row_cosine"] == pytest.approx(1 - 2 * 2 / 80)
    assert found["row_cosine_p5"] == pytest.approx(1)
    wrong[0, 2:6] *= -1
    assert measure(TOKENS, wrong)["row_cosine_p5"] == pytest.approx(-1)


def test_the_correlation_is_that_of_the_worst_image_and_knows_no_offset() -> None:
    other = TOKENS * 2 + 3
    assert measure(TOKENS, other)["correlation"] == pytest.approx(1)
    other[1] = np.random.default_rng(1).standard_normal(other[1].shape)
    assert measure(TOKENS, other)["correlation"] == pytest.approx(
        np.corrcoef(TOKENS[1].ravel(), other[1].ravel())[0, 1], abs=1e-6
    )


def test_the_regret_is_what_the_chosen_class_lacks() -> None:
    near, far = SCORES.copy(), SCORES.copy()
    near[0, 3] = 6  # 4.9 was recorded, the best is 5
    far[1, 1] = 6  # 0 was recorded, the best is 3
    assert measure(SCORES, SCORES * 3)["regret"] == 0
    assert measure(SCORES, near)["regret"] == pytest.approx(0.1 / SCORES[0].std(), rel=1e-5)
    assert measure(SCORES, far)["regret"] == pytest.approx(3 / SCORES[1].std(), rel=1e-5)


def test_a_wrong_scale_fails_though_it_turns_no_row() -> None:
    for task in ("tokens", "vector", "map"):
        assert failures(TOLERANCES["int8"], TASK_TOLERANCES["int8"][task], TOKENS, TOKENS * 1.2)[0].startswith(
            "relative l2 0.2"
        )
    assert failures(TOLERANCES["int8"], TASK_TOLERANCES["int8"]["classes"], SCORES, SCORES * 1.2) == []


def test_an_output_fails_by_its_task_alone_where_that_is_known() -> None:
    task = TaskTolerance(task="classes", regret=0.1)
    near = SCORES.copy()
    near[0, 3] = 9
    assert failures(TOLERANCES["int8"], task, SCORES, near) == []
    relative_l2, cosine = failures(TOLERANCES["int8"], None, SCORES, near)
    assert relative_l2.startswith("relative l2 0.5")
    assert relative_l2.endswith(" (tolerance 0.1)")
    assert cosine.endswith(" (tolerance 0.995)")
    strict = task.model_copy(update={"regret": 0.01})
    assert failures(TOLERANCES["int8"], strict, SCORES, near) == ["regret 0.0443814 (tolerance 0.01)"]
    assert failures(TOLERANCES["int8"], task, SCORES, near[:1]) == ["shape [1, 4], but [2, 4] was recorded"]
    near[0, 0] = np.nan
    assert failures(TOLERANCES["int8"], task, SCORES, near) == ["NaN or infinite values"]


@pytest.mark.parametrize("task", ["tokens", "vector", "map", "classes"])
def test_the_documented_tolerances_are_these(task: str) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    cells = (
        "; ".join(f"{limit:g}" for limit in TASK_TOLERANCES[kind][task].limits().values()) for kind in ("int8", "fp8")
    )
    (row,) = re.findall(rf"^\| (?:a )?{task}\b.* \| (.* \| .*) \|$", text, re.MULTILINE)
    assert row.endswith(" | ".join(cells))


@pytest.mark.parametrize("kinds", ["int8", "fp8"])
def test_no_tolerance_takes_another_photographs_output(kinds: str) -> None:
    """Rows, maps and scores that have nothing to do with each other are far out of each."""
    other = np.random.default_rng(1).standard_normal(TOKENS.shape).astype(np.float32)
    for task in TASK_TOLERANCES[kinds].values():
        assert len(failures(TOLERANCES[kinds], task, TOKENS, other)) == len(task.limits())
