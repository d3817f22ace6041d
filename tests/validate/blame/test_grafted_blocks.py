"""Which block of a grafted file costs what, and which is broken: without PyTorch, against the file that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from broken_files import break_file

from fna.correction import Correction
from fna.export.operators.registry import attach_functions
from fna.export.surgery.graft import GraftOptions, graft
from fna.files import load_onnx
from fna.plan import BlockPlan, MaskPlan, Plan
from fna.validate.blame.effects import block_effects
from fna.validate.budget.chain import Chain, open_chain, open_validated_file
from fna.validate.budget.measure import validate_file
from fna.validate.budget.runners import OnnxRunner
from fna.validate.budget.undoing import undo_nodes
from fna.validate.metrics import measure
from fna.validate.photographs import Photographs
from fna.validate.report.document import Document, Extras, make_document

TAPS = ((0.0, 0.1, 0.0, 0.1, 0.2, 0.1, 0.0, 0.1, 0.0),)
PLANS = {
    "plain": Plan(num_blocks=3, blocks=(BlockPlan(block=1, landmarks=12), BlockPlan(block=2, landmarks=12))),
    "one head, corrected, other iterations": Plan(
        num_blocks=3,
        blocks=(
            BlockPlan(block=1, landmarks=9, sampler="norm-grid", iterations=4),
            BlockPlan(block=2, landmarks=9, heads=(1,), correction=Correction(size=3, kernels=TAPS, gains=(0.8,))),
        ),
        prefix_tokens=1,
        patches=(8, 8),
    ),
    "masked": Plan(
        num_blocks=3,
        blocks=(BlockPlan(block=2, landmarks=9),),
        masks=(MaskPlan(blocks="1-2", tokens=(3, 9), sink=True),),
        prefix_tokens=1,
    ),
}


def quietly(*_progress: object) -> None:
    """Say nothing."""


def open_grafted(tiny, path: Path) -> Chain:
    return open_chain(open_validated_file(path, tiny.file("dense")), None, quietly)


def pixels_of(chain: Chain, tiny):
    return chain.metadata.preprocessing.apply(tiny.images[0][1], chain.height, chain.width)[None]


def regraft(tiny, folder: Path, plan: Plan) -> Path:
    path = folder / "regrafted.onnx"
    graft(tiny.file("dense"), path, GraftOptions(plan=plan, check=False))
    return path


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_file_with_exact_attention_in_all_nodes_is_the_original_again(tiny, tmp_path: Path, plan: Plan) -> None:
    path = regraft(tiny, tmp_path, plan)
    result, _ = validate_file(path, tiny.images[:1], original=tiny.file("dense"))
    approximation, export, *_ = result.steps
    assert all(error.relative_l2 > 1e-3 for error in approximation.errors)
    assert all(error.relative_l2 < 1e-5 for error in export.errors)
    assert "with exact attention in its nodes, the file against dense.onnx" in export.compares


@pytest.mark.parametrize("plan", [PLANS["plain"], PLANS["masked"]], ids=["plain", "masked"])
def test_undoing_a_block_leaves_what_grafting_the_others_gives(tiny, tmp_path: Path, plan: Plan) -> None:
    chain = open_grafted(tiny, regraft(tiny, tmp_path, plan))
    image = pixels_of(chain, tiny)
    undone = OnnxRunner(undo_nodes(chain.proto, {2}), tmp_path, "undone").run(image)
    others = plan.model_copy(update={"blocks": tuple(entry for entry in plan.blocks if entry.block != 2)})
    wanted = OnnxRunner(regraft(tiny, tmp_path, others), tmp_path, "others").run(image)
    for name, array in wanted.items():
        assert measure(name, array, undone[name]).relative_l2 < 1e-5


def test_effects_are_those_of_grafting_one_block_alone(tiny, tmp_path: Path) -> None:
    chain = open_grafted(tiny, tiny.file("grafted"))
    image = pixels_of(chain, tiny)
    effects = {(item.block, item.output): item for item in block_effects(chain, [image], quietly)}
    assert sorted(effects) == [(block, name) for block in (1, 2) for name in ("last_hidden_state", "pooler_output")]
    exact = chain.stages["exact"](image)
    for entry in PLANS["plain"].blocks:
        one = regraft(tiny, tmp_path, PLANS["plain"].model_copy(update={"blocks": (entry,)}))
        given = OnnxRunner(one, tmp_path, "one").run(image)
        error = measure("", exact["last_hidden_state"], given["last_hidden_state"]).relative_l2
        assert effects[entry.block, "last_hidden_state"].alone == pytest.approx(error, rel=1e-4)
        other = effects[3 - entry.block, "last_hidden_state"]
        assert other.all_but == pytest.approx(error, rel=1e-4)  # of two blocks, all but one is the other alone
        whole = chain.stages["fna"](image)["last_hidden_state"]
        assert other.everything == pytest.approx(measure("", exact["last_hidden_state"], whole).relative_l2, rel=1e-4)


def grafted_node(model: onnx.ModelProto, block: int) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name.endswith(f"fna_block_{block}"))


def swap_key_and_value(model: onnx.ModelProto, block: int) -> None:
    node = grafted_node(model, block)
    node.input[1], node.input[2] = node.input[2], node.input[1]


def take_another_value(model: onnx.ModelProto, block: int) -> None:
    grafted_node(model, block).input[2] = grafted_node(model, block).input[0]


def change_scale(model: onnx.ModelProto, block: int) -> None:
    next(item for item in grafted_node(model, block).attribute if item.name == "scale").f *= 1.1


def leave_out_an_iteration(model: onnx.ModelProto, block: int) -> None:
    next(item for item in grafted_node(model, block).attribute if item.name == "iterations").i = 5
    attach_functions(model, onnx.TensorProto.FLOAT)


def break_the_body(model: onnx.ModelProto, block: int) -> None:
    """Of this block's node alone: the function gets a twin that forgets the landmark bias."""
    node = grafted_node(model, block)
    function = next(item for item in model.functions if item.name == node.op_type)
    twin = model.functions.add()
    twin.CopyFrom(function)
    twin.overload = node.overload = "broken"
    model.ir_version = max(model.ir_version, 10)
    reader = next(item for item in twin.node if "landmark_bias" in item.input)
    zero = twin.node.add()
    zero.CopyFrom(onnx.helper.make_node("Sub", ["landmark_bias", "landmark_bias"], ["no_bias"]))
    nodes = [zero, *(item for item in twin.node if item is not zero)]
    reader.input[list(reader.input).index("landmark_bias")] = "no_bias"
    copies = [onnx.NodeProto.FromString(item.SerializeToString()) for item in nodes]
    del twin.node[:]
    twin.node.extend(copies[:1] + [item for item in copies[1:] if item.output[0] != "no_bias"])


def break_and_validate(tiny, folder: Path, change: Callable[[onnx.ModelProto], None], **extras) -> Document:
    broken = break_file(tiny.file("grafted"), folder / "broken.onnx", change)
    photographs = Photographs(tiny.images[:1])
    return make_document(broken, photographs, {}, None, tiny.file("dense"), Extras(**extras), quietly)[0]


@pytest.mark.parametrize(
    ("change", "part", "cause"),
    [
        (change_scale, "fna", "has scale 0.275, but the file's plan and table of the original say 0.25"),
        (leave_out_an_iteration, "fna", "has iterations 5, but the file's plan and table of the original say 6"),
        (break_the_body, "fna", "does not return FNA of its inputs (relative L2 error"),
        (swap_key_and_value, "attention", ": its key and value are exchanged"),
        (take_another_value, "attention", "is given is not the original's"),
    ],
)
@pytest.mark.parametrize("block", [1, 2])
def test_a_broken_block_of_a_grafted_file_is_caught_and_named(
    tiny, tmp_path: Path, change, part: str, cause: str, block: int
) -> None:
    document = break_and_validate(tiny, tmp_path, partial(change, block=block))
    (found,) = document.divergences
    assert (found.step, found.block, found.part) == ("export", block, part)
    assert cause in str(found.cause)
    assert f"fna_block_{block}" in str(found.cause)
    named = f"export: first divergence in block {block}, "
    assert any(line.startswith(named) for line in document.failures())


def test_bisecting_a_grafted_file_measures_its_blocks_in_every_step(tiny) -> None:
    photographs = Photographs(tiny.images[:1])
    document, _ = make_document(tiny.file("grafted"), photographs, {}, None, None, Extras(bisect=True), quietly)
    found = document.bisection
    assert found is not None
    assert [place.block for place in found.places["approximation"]] == [1, 2]
    assert all(0 < place.relative_l2 < 1 for place in found.places["approximation"])
    assert [(place.block, place.part) for place in found.places["export"]] == [
        (1, "fna"), (1, "attention"), (2, "fna"), (2, "attention"),
    ]  # fmt: skip
    assert all(place.relative_l2 < 1e-5 for place in found.places["export"])
    assert {effect.block for effect in found.effects} == {1, 2}
    assert "making block" in document.summary()[0]
    assert found.not_measured.keys() == {"processor"}


def test_a_grafted_file_in_fp16_is_undone_as_well(tiny, tmp_path: Path) -> None:
    from fna.export.passes.precision import cast_model
    from fna.files import save_model

    path = tmp_path / "fp16.onnx"
    save_model(cast_model(load_onnx(tiny.file("grafted")), "fp16"), path)
    chain = open_grafted(tiny, path)
    image = pixels_of(chain, tiny)
    exact = chain.stages["exact"](image)["last_hidden_state"]
    undone = OnnxRunner(undo_nodes(chain.proto, {1, 2}), tmp_path, "undone").run(image)["last_hidden_state"]
    assert np.isfinite(undone).all()
    assert 1e-5 < measure("", exact, undone).relative_l2 < 1e-2  # fp16's rounding is left, and nothing of FNA
