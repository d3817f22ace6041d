"""Which linear layers of a file in 8 bits cost most, as `fna validate` says it."""

from __future__ import annotations

from pathlib import Path

from fna.export.metadata import read_metadata
from fna.export.passes.layer_costs import LayerCost
from fna.export.variants import FileVariant, make_variant
from fna.files import load_onnx
from fna.validate.blame.linear_layers import KEPT, describe_linear_layers, measure_linear_layers
from fna.validate.budget.chain import open_chain, open_validated_file
from fna.validate.photographs import Photographs
from fna.validate.report.document import Extras, make_document


def test_every_layer_of_an_8_bit_file_is_measured_and_none_of_another(tiny, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    make_variant(tiny.file("fp32"), path, FileVariant("fp16", ("int8",), check=False), tiny.images)

    def measured(file: Path) -> tuple[LayerCost, ...]:
        chain = open_chain(open_validated_file(file), None, lambda *_: None)
        pixels = [chain.metadata.preprocessing.apply(tiny.images[0][1], chain.height, chain.width)[None]]
        return measure_linear_layers(chain, pixels, lambda *_: None)

    assert measured(tiny.file("fp32")) == ()
    document, _ = make_document(path, Photographs(tiny.images[:1]), {}, None, None, Extras(), lambda *_: None)
    costs = document.linear_layers  # without being asked for
    assert [cost.alone for cost in costs] == sorted(cost.alone for cost in costs)
    assert costs[0].everything < costs[-1].alone
    assert [cost.without is None for cost in costs] == [place >= KEPT[-1] for place in range(len(costs))]
    assert {cost.block for cost in costs} == set(range(chain_blocks(path)))
    assert all(cost.block_alone < cost.alone + 1e-5 for cost in costs)  # one layer of several
    assert "by block, alone: 0.9" in describe_linear_layers(costs)[-1]
    assert describe_linear_layers(costs)[0].startswith("linear layers in 8 bits, mean cosine: 0.9")


def chain_blocks(path: Path) -> int:
    return read_metadata(load_onnx(path), "x").plan.num_blocks


def test_the_gain_of_keeping_layers_is_told_by_their_number() -> None:
    costs = [LayerCost((f"layer {index}",), 0.99 + index / 1000, 0.95, 0.96 + index / 100) for index in range(4)]
    lines = describe_linear_layers(costs)
    assert "0.950000 with all, 0.960000 without 1, 0.970000 without 2 of the costliest" in lines[0]
    assert lines[1] == "  layer 0: 0.990000 alone"
