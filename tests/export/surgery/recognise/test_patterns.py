"""The table of patterns: another spelling of attention is a module with a PATTERN and a line in the table."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest
import surgery_zoo as zoo
from surgery_helpers import Export

from fna.export.surgery.graft import GraftOptions, graft, inspect_file
from fna.export.surgery.recognise import scan
from fna.export.surgery.recognise.context import Context
from fna.export.surgery.recognise.identify import identify
from fna.export.surgery.recognise.match import find_core
from fna.export.surgery.recognise.pattern import AttentionPattern
from fna.export.surgery.recognise.patterns import PATTERNS
from fna.export.surgery.recognise.rows import Attention, Row


def test_each_kind_of_node_is_read_by_one_pattern_and_unknown_attention_by_none_before_it() -> None:
    names = [pattern.name for pattern in PATTERNS]
    assert len(set(names)) == len(names)
    assert names.index("unknown") > max(names.index(name) for name in ("fna", "Attention", "MultiHeadAttention"))


def test_a_new_pattern_is_one_entry_of_the_table(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax of another domain is nothing that any of our patterns knows."""
    model = onnx.load(export("packed_timm", lambda: zoo.Vit(lambda: zoo.Packed("timm"))))
    model.opset_import.append(onnx.helper.make_opsetid("theirs", 1))
    for node in model.graph.node:
        if node.op_type == "Softmax":
            node.domain = "theirs"
    source = tmp_path / "theirs.onnx"
    onnx.save(model, source)
    assert inspect_file(source) == []

    def read(context: Context, node: gs.Node, row: Row) -> Attention | None:
        core = find_core(context, node.inputs[0].name, node.outputs[0].name, 3)
        return None if core is None else identify(context, core)

    theirs = AttentionPattern("theirs", lambda node: node.domain == "theirs", read)
    monkeypatch.setattr(scan, "PATTERNS", (theirs, *PATTERNS))
    result = graft(source, tmp_path / "out.onnx", GraftOptions(landmarks=3, check=False))
    assert result.replaced == 2
    left = [node.output[0] for node in onnx.load(tmp_path / "out.onnx").graph.node if node.domain == "theirs"]
    assert left == ["y"], "the softmax over classes is no attention"
