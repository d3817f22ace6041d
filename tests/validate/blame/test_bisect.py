"""The block to blame: what is broken in one block is found in that block, with its cause where the file says it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from broken_files import break_file, change_scale, change_weight, leave_out_an_iteration, swap_key_and_value

from fna.export.passes.lower import lower
from fna.export.preprocessing import bundled_photographs
from fna.export.sources.running import patched, run_torch
from fna.files import load_onnx
from fna.validate.blame.bisect import locate
from fna.validate.blame.effects import block_effects
from fna.validate.budget.chain import Chain, open_chain, open_validated_file
from fna.validate.metrics import measure
from fna.validate.photographs import Photographs
from fna.validate.report.document import Extras, make_document


def quietly(*_progress: object) -> None:
    """Say nothing."""


def open_file(path: Path) -> Chain:
    return open_chain(open_validated_file(path), None, quietly)


def test_a_broken_block_of_the_real_model_is_caught_and_named(
    exported: Path, saliency_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fna.validate.budget.chain.load_model", lambda _name: saliency_model)
    broken = break_file(exported, tmp_path / "broken.onnx", partial(swap_key_and_value, block=8))
    photographs = Photographs(bundled_photographs()[:1])
    document, _ = make_document(broken, photographs, {}, None, None, Extras(), quietly)
    failures = document.failures()
    assert "export: output saliency has relative L2 error" in failures[0]
    assert "(tolerance 1e-03)" in failures[0]
    assert "first divergence in block 8, FNA operator" in failures[-1]
    assert failures[-1].endswith("node /blocks.8/FastNystromAttention: its key and value are exchanged")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (change_scale, "has scale 0.275, but the model has 0.25"),
        (leave_out_an_iteration, "has iterations 5, but the model has 6"),
    ],
)
def test_a_changed_attribute_is_named(tiny, tmp_path: Path, change, cause: str) -> None:
    chain = open_file(break_file(tiny.file("fp32"), tmp_path / "broken.onnx", partial(change, block=2)))
    place = locate(chain, "export", 1e-4, pixels(chain, tiny))
    assert place is not None
    assert (place.block, place.part) == (2, "fna")
    assert cause in place.describe()


def test_a_changed_weight_is_blamed_on_its_block_and_not_on_its_fna(tiny, tmp_path: Path) -> None:
    change = partial(change_weight, scope="model.encoder.layer.1.mlp.fc1", factor=1.05)
    chain = open_file(break_file(tiny.file("fp32"), tmp_path / "broken.onnx", change))
    found = locate(chain, "export", 1e-3, pixels(chain, tiny))
    assert found is not None
    assert (found.block, found.part) == (1, "output")
    assert found.cause == "its FNA operator agrees, so its linear layers or norms differ"


def test_a_changed_weight_of_an_exact_block_is_blamed_on_it(tiny, tmp_path: Path) -> None:
    change = partial(change_weight, scope="model.encoder.layer.0.attention.v_proj", factor=1.05)
    chain = open_file(break_file(tiny.file("fp32"), tmp_path / "broken.onnx", change))
    found = locate(chain, "export", 1e-3, pixels(chain, tiny))
    assert found is not None
    assert (found.block, found.part) == (0, "output")


def test_a_changed_value_projection_is_named(tiny, tmp_path: Path) -> None:
    change = partial(change_weight, scope="model.encoder.layer.2.attention.v_proj", factor=1.2)
    chain = open_file(break_file(tiny.file("fp32"), tmp_path / "broken.onnx", change))
    found = locate(chain, "export", 1e-3, pixels(chain, tiny))
    assert found is not None
    assert found.block == 2
    assert "most of all its value (relative L2 error 2.0e-01)" in str(found.cause)


def test_blocks_are_found_in_a_portable_file_too(tiny, tmp_path: Path) -> None:
    model = load_onnx(tiny.file("fp32"))
    swap_key_and_value(model, block=2)
    path = tmp_path / "portable.onnx"
    path.write_bytes(lower(model, "portable").SerializeToString())
    chain = open_file(path)
    found = locate(chain, "export", 1e-3, pixels(chain, tiny))
    assert found is not None
    assert (found.block, found.part) == (2, "fna")


def test_an_error_behind_the_blocks_is_not_blamed_on_one(tiny, tmp_path: Path) -> None:
    def change(model) -> None:
        last = [node for node in model.graph.node if node.op_type == "LayerNormalization"][-1]
        next(item for item in last.attribute if item.name == "epsilon").f = 1.0

    chain = open_file(break_file(tiny.file("fp32"), tmp_path / "broken.onnx", change))
    found = locate(chain, "export", 1e-3, pixels(chain, tiny))
    assert found is not None
    assert found.block is None
    assert "after the last block" in found.describe()


def test_a_precision_error_is_located_in_the_rounded_file(tiny, tmp_path: Path) -> None:
    change = partial(change_weight, scope="model.encoder.layer.1.mlp.fc2", factor=1.5)
    chain = open_file(break_file(tiny.file("fp16"), tmp_path / "broken.onnx", change))
    found = locate(chain, "precision", 2e-2, pixels(chain, tiny))
    assert found is not None
    assert (found.block, found.part) == (1, "output")


def test_effects_are_the_errors_of_one_block_alone_and_of_all_but_it(tiny) -> None:
    chain = open_file(tiny.file("fp32"))
    image = pixels(chain, tiny)
    effects = {(item.block, item.output): item for item in block_effects(chain, [image], quietly)}
    assert sorted(effects) == [(block, name) for block in (1, 2) for name in ("last_hidden_state", "pooler_output")]
    plan = chain.metadata.plan
    exact = run_torch(chain.model, image)
    for number, keep in ((1, 0), (2, 1)):
        with patched(chain.model, plan.model_copy(update={"blocks": (plan.blocks[keep],)})):
            alone = run_torch(chain.model, image)
        error = measure("", exact["last_hidden_state"], alone["last_hidden_state"]).relative_l2
        assert effects[number, "last_hidden_state"].alone == pytest.approx(error, rel=1e-6)
        other = effects[3 - number, "last_hidden_state"]
        assert other.all_but == pytest.approx(error, rel=1e-6)  # of two blocks, all but one is the other alone


def test_bisect_looks_into_every_step_that_can_be(tiny) -> None:
    photographs = Photographs(tiny.images)
    document, _ = make_document(tiny.file("fp16"), photographs, {}, None, None, Extras(bisect=True), quietly)
    found = document.bisection
    assert found is not None
    assert set(found.places) == {"approximation", "export", "precision"}
    assert [(place.block, place.part) for place in found.places["export"]] == [
        (0, "output"), (1, "fna"), (1, "output"), (2, "fna"), (2, "output"),
    ]  # fmt: skip
    assert found.divergences == ()
    assert "making block" in document.summary()[0]


def pixels(chain: Chain, tiny):
    return chain.metadata.preprocessing.apply(tiny.images[0][1], chain.height, chain.width)[None]
