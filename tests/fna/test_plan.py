"""Plans: reading, writing, and refusing what does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import onnx
import pytest

from fna.arithmetic import saved_part
from fna.block_steps import steps_of
from fna.chebyshev import ChebyshevSteps, default_core
from fna.errors import InputFileError, InvalidArgumentError, InvalidPlanError
from fna.export.metadata import read_metadata
from fna.plan import (
    ITERATIONS_OF_VERSION_1,
    BlockPlan,
    FocalBlockPlan,
    Plan,
    TokenRange,
    load_plan,
    parse_plan,
    uniform_plan,
)


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
        ('{"num_blocks": 12, "version": 5}', "version"),
        (
            '{"num_blocks": 12, "core": "chebyshev", "steps": 8, "low": 0.05}',
            "version is 1; plans that name one have version 3",
        ),
        (
            '{"num_blocks": 12, "version": 3, "core": "chebyshev", "steps": 8}',
            "needs steps and low, but they are 8 and None",
        ),
        ('{"num_blocks": 12, "version": 3, "core": "chebyshev", "steps": 8, "low": 1.5}', "low 1.5"),
        ('{"num_blocks": 12, "version": 3, "steps": 8, "low": 0.05}', "of the chebyshev core, but core is not given"),
        (
            '{"num_blocks": 12, "version": 3, "method": "published", "core": "chebyshev", "steps": 8, "low": 0.05}',
            "the published method has newton_schulz",
        ),
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


def fitted(heads: int, size: int = 3) -> dict[str, object]:
    return {"size": size, "kernels": [[0.1] * size**2] * heads, "gains": [0.9] * heads}


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"heads": []}, "blocks.0.heads"),
        ({"heads": [2, 1]}, "heads must be listed once each, ascending"),
        ({"heads": [1], "correction": fitted(2)}, "kernels for 2 heads, but heads lists 1"),
        ({"correction": fitted(2, size=4)}, "odd size"),
        ({"correction": {**fitted(2), "gains": [1.0]}}, "one per head"),
        ({"correction": {**fitted(2), "size": 5}}, "kernels.0 has 9 weights, but 25 are needed"),
        ({"correction": {**fitted(2), "colour": 1}}, "blocks.0.correction.colour"),
        ({"iterations": 0}, "blocks.0.iterations"),
    ],
)
def test_what_a_block_says_of_heads_and_corrections_must_agree(block: dict[str, object], said: str) -> None:
    text = json.dumps({"num_blocks": 12, "blocks": [{"block": 1, "landmarks": 8, **block}]})
    with pytest.raises(InvalidPlanError, match=re.escape(said)):
        parse_plan(text)


def test_a_plan_refuses_a_model_and_a_size_that_it_was_not_made_for() -> None:
    plan = Plan(num_blocks=12, model="one", resolution=(518, 784))
    plan.check_fits("one", (518, 784))
    with pytest.raises(InvalidPlanError, match="for model one, but the model is two"):
        plan.check_fits("two", (518, 784))
    with pytest.raises(InvalidPlanError, match="518x784 images, but the resolution is 784x518"):
        plan.check_fits("one", (784, 518))
    with pytest.raises(InvalidPlanError, match="left open"):
        plan.check_fits("one", None)


def test_a_plan_may_cross_from_pytorch_to_an_onnx_file_but_not_between_files() -> None:
    Plan(num_blocks=12, model="one").check_fits("file.onnx", None)
    with pytest.raises(InvalidPlanError, match=r"one\.onnx"):
        Plan(num_blocks=12, model="one.onnx").check_fits("two.onnx", None)


def test_blocks_override_the_plans_iterations_and_resampling() -> None:
    plan = Plan(
        num_blocks=3,
        blocks=(BlockPlan(block=0, landmarks=8), BlockPlan(block=1, landmarks=8, iterations=3, resample=True)),
    )
    assert [plan.iterations_of(entry) for entry in plan.blocks] == [6, 3]
    assert [plan.resamples(entry) for entry in plan.blocks] == [False, True]


def test_blocks_override_the_plans_core() -> None:
    blocks = (
        BlockPlan(block=0, landmarks=8),
        BlockPlan(block=1, landmarks=8, core="newton_schulz"),
        BlockPlan(block=2, landmarks=8, core="chebyshev", steps=3, low=0.1),
    )
    plan = Plan(num_blocks=3, blocks=blocks, core="chebyshev", steps=8, low=0.05)
    cores = [ChebyshevSteps(8, 0.05), None, ChebyshevSteps(3, 0.1)]
    assert [plan.chebyshev_of(entry) for entry in plan.blocks] == cores
    assert parse_plan(plan.dump_json()) == plan
    assert plan.describe_blocks().endswith("weighted, 3/8 Chebyshev steps or Newton-Schulz")
    assert [steps_of(plan, block).nystrom.chebyshev for block in range(3)] == cores  # type: ignore[union-attr]


def test_only_plans_that_name_a_core_have_the_version_that_knows_it() -> None:
    plain, focal = Plan(num_blocks=2), Plan(num_blocks=2, focal=(FocalBlockPlan(block=1),))
    block = Plan(num_blocks=2, blocks=(BlockPlan(block=0, landmarks=8, core="chebyshev", steps=3, low=0.1),))
    whole = Plan(num_blocks=2, core="newton_schulz")
    written = [json.loads(plan.dump_json()) for plan in (plain, focal, block, whole)]
    assert [fields["version"] for fields in written] == [1, 2, 3, 3]
    assert [{"core", "steps", "low"} & {*fields} for fields in written] == [set(), set(), set(), {"core"}]
    assert {"core", "steps", "low"} <= {*written[2]["blocks"][0]}
    assert all("core" not in entry for fields in written[:2] for entry in fields["blocks"])


@pytest.mark.parametrize("version", [1, 2])
def test_a_plan_file_without_a_core_means_newton_schulz_whatever_the_default_is(version: int) -> None:
    text = f'{{"version": {version}, "num_blocks": 2, "blocks": [{{"block": 0, "landmarks": 128}}]}}'
    plan = parse_plan(text)
    assert plan.chebyshev_of(plan.blocks[0]) is None
    assert uniform_plan(2, landmarks=128).chebyshev == default_core(128, "weighted")  # a new plan has the default


@pytest.mark.parametrize(
    ("settings", "core"),
    [
        ({"landmarks": 64}, None),
        ({"landmarks": 96}, ChebyshevSteps(10, 0.03)),
        ({"landmarks": 128, "method": "published"}, None),
        ({"landmarks": 128, "core": "newton_schulz"}, None),
        ({"landmarks": 64, "core": "chebyshev"}, ChebyshevSteps(10, 0.03)),
        ({"landmarks": 64, "steps": 6}, ChebyshevSteps(6, 0.03)),
        ({"landmarks": 128, "low": 0.2}, ChebyshevSteps(8, 0.2)),
    ],
)
def test_a_uniform_plan_has_the_core_named_or_the_usual_one(
    settings: dict[str, Any], core: ChebyshevSteps | None
) -> None:
    plan = uniform_plan(2, **settings)
    assert plan.chebyshev == core
    assert plan.version == (1 if core is None else 3)


def test_steps_of_newton_schulz_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="core is newton_schulz; leave them out"):
        uniform_plan(2, core="newton_schulz", steps=8)


def test_the_plan_that_the_documentation_shows_can_be_read() -> None:
    plan = load_plan(Path(__file__).parents[2] / "docs" / "plans" / "dinov2-small-saliency-518.json")
    plan.check_fits("dinov2-small-saliency", (518, 518))
    assert saved_part(plan, 1370, 6, 64) == pytest.approx(plan.made_from["saved_products"], abs=1e-4)


@pytest.mark.parametrize("key", ["landmarks_include", "landmarks_exclude"])
def test_tokens_that_landmarks_include_or_exclude_are_found_at_the_first_fna_block_of_their_range(key: str) -> None:
    which = key.removeprefix("landmarks_")
    plan = uniform_plan(
        12,
        layers="2-3,6-11",
        **{key: (TokenRange(blocks="0-7", tokens="massive"), TokenRange(blocks="9", tokens=(3, 5)))},
    )
    assert parse_plan(plan.dump_json()) == plan
    assert plan.find_landmark_range(which, 7) == (2, getattr(plan, key)[0])
    assert plan.find_landmark_range(which, 9) == (9, getattr(plan, key)[1])
    assert plan.find_landmark_range(which, 8) is None
    keys = [plan.sharing_key(entry) for entry in plan.blocks]
    assert keys[0] == keys[3], "blocks 2 and 7 share landmarks"
    assert len({keys[0], keys[4], keys[5]}) == 3, "blocks 7, 8 and 9 do not"
    assert keys[4] == keys[7], "blocks 8 and 11 do"


@pytest.mark.parametrize("key", ["landmarks_include", "landmarks_exclude"])
@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"blocks": "6-12", "tokens": "massive"}, r"{}.0.blocks: .*block 12"),
        ({"blocks": "6-8", "tokens": "large"}, r"{}.0.tokens"),
        ({"blocks": "6-8", "tokens": [-1]}, r"{}.0.tokens"),
        ({"blocks": "6-8", "tokens": "massive", "sink": True}, r"{}.0.sink"),
        ({"blocks": "0-2", "tokens": "massive"}, r"{}.0.blocks: none of these blocks is FNA"),
        ({"blocks": "6-11", "tokens": "massive"}, r"{}.0.blocks: .*block 9 .*sampler lattice; choose .*norm-grid"),
    ],
)
def test_malformed_landmark_ranges_name_the_key(key: str, entry: dict[str, Any], said: str) -> None:
    blocks = [{"block": number, "landmarks": 8} for number in range(6, 9)]
    blocks.append({"block": 9, "landmarks": 8, "sampler": "lattice"})
    text = json.dumps({"num_blocks": 12, "blocks": blocks, key: [entry]})
    with pytest.raises(InvalidPlanError, match=said.format(key)) as caught:
        parse_plan(text)
    assert "\n" not in str(caught.value)


def test_a_block_is_in_one_range_of_a_kind_at_most() -> None:
    ranges = (TokenRange(blocks="1-2", tokens="massive"), TokenRange(blocks="2-3", tokens=(3,)))
    with pytest.raises(InvalidPlanError, match="block 2 is in more than one of the landmarks_include"):
        uniform_plan(4, layers="all", landmarks_include=ranges)
    uniform_plan(4, layers="all", landmarks_include=ranges[:1], landmarks_exclude=ranges[1:])


def test_what_a_file_without_iterations_means_outlives_the_methods_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fna.attention.NEWTON_SCHULZ_ITERATIONS", 4)
    text = '{"version": 1, "num_blocks": 2, "blocks": [{"block": 1, "landmarks": 8}]}'
    assert parse_plan(text).iterations == ITERATIONS_OF_VERSION_1 == 6
    new = Plan(num_blocks=2)
    assert new.iterations == 4
    assert parse_plan(new.dump_json()).iterations == 4
    model = onnx.ModelProto()
    model.metadata_props.add(key="fna.plan", value=text)
    for key, value in {"source": "tests", "origin": "trace", "precision": "fp32"}.items():
        model.metadata_props.add(key=f"fna.{key}", value=value)
    model.metadata_props.add(key="fna.preprocessing", value="{}")
    assert read_metadata(model, "old.onnx").plan.iterations == ITERATIONS_OF_VERSION_1


def test_a_plan_with_focal_blocks_has_version_2_and_reads_back() -> None:
    plan = Plan(num_blocks=12, focal=(FocalBlockPlan(block=3, tile=4, levels=((1, 0), (2, 2)), hot=8, seed=5),))
    assert plan.version == 2
    assert parse_plan(plan.dump_json()) == plan
    assert plan.replaced_blocks == [3]


def test_a_plan_without_focal_blocks_is_written_as_version_1_has_it() -> None:
    fields = json.loads(uniform_plan(12).dump_json())
    assert fields["version"] == 1
    assert "focal" not in fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"focal": [{"block": 1}], "version": 1}, "plans with them have version 2"),
        ({"focal": [{"block": 1}, {"block": 0}], "version": 2}, "listed once each, ascending"),
        ({"focal": [{"block": 12}], "version": 2}, "the model has blocks 0 to 11"),
        ({"focal": [{"block": 1}], "blocks": [{"block": 1, "landmarks": 8}], "version": 2}, "one of both at most"),
        ({"focal": [{"block": 1, "levels": [[1, 0], [3, 2], [4, 3]]}], "version": 2}, "multiple of the one before"),
        ({"focal": [{"block": 1, "levels": [[2, 0]]}], "version": 2}, "the first must be"),
        ({"focal": [{"block": 1, "seed": 4294967296}], "version": 2}, "seed is 4294967296"),
    ],
)
def test_focal_blocks_that_cannot_be_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidPlanError, match=message):
        parse_plan(json.dumps({"num_blocks": 12, **fields}))


TOWERS = {"near": "0,2", "far": "1,3"}


def test_a_plan_of_several_towers_numbers_blocks_tower_by_tower_in_its_file() -> None:
    plan = uniform_plan(4, layers="far:1", towers=TOWERS, landmarks=8)
    assert plan.version == 4
    assert [block.block for block in plan.blocks] == [3]
    text = plan.dump_json()
    written = json.loads(text)
    assert [(entry["tower"], entry["block"]) for entry in written["blocks"]] == [("far", 1)]
    assert parse_plan(text) == plan
    assert "towers" not in json.loads(uniform_plan(4).dump_json())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": 3}, "version is 3; plans with them have version 4"),
        ({"towers": {"near": "0,2"}, "blocks": []}, "towers must hold each of the 4 blocks once"),
        ({"towers": {"near": "0,7"}}, "towers: layers '0,7' name block 7"),
        ({"blocks": [{"tower": "far", "block": 2, "landmarks": 8}]}, "blocks name block 2 of tower far"),
        ({"blocks": [{"block": 1, "landmarks": 8}]}, "blocks name block 1 of tower None"),
        ({"masks": [{"blocks": "0-1", "tokens": [0]}]}, "name no tower of the model, which has 2: near, far"),
    ],
)
def test_a_malformed_plan_of_towers_names_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    whole = {"version": 4, "num_blocks": 4, "towers": TOWERS, "blocks": [{"tower": "far", "block": 1, "landmarks": 8}]}
    with pytest.raises(InvalidPlanError, match=said) as caught:
        parse_plan(json.dumps({**whole, **fields}))
    assert "\n" not in str(caught.value)


def test_masks_of_a_plan_of_towers_are_found_by_tower() -> None:
    whole = {"version": 4, "num_blocks": 4, "towers": TOWERS, "masks": [{"blocks": "far:all", "tokens": [0]}]}
    assert parse_plan(json.dumps(whole)).masked_blocks == {1, 3}
