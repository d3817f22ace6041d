"""Block numbers in the names of nodes, and the modules that a trace's nodes come from."""

from __future__ import annotations

import pytest
from onnx import NodeProto, helper

from fna.export.blocks import attention_block, block_of_name, grafted_node_name, module_scopes, traced_node_name

FNA = "FastNystromAttention"


def named(name: str) -> NodeProto:
    return helper.make_node("MatMul", ["a", "b"], ["c"], name=name)


@pytest.mark.parametrize("block", [0, 7, 11, 123])
def test_names_give_back_the_block_that_they_were_written_with(block: int) -> None:
    for name in (traced_node_name(block, FNA), grafted_node_name("/encoder/layer.3/attention/MatMul", block)):
        for form in (name, f"{name}/core"):
            assert block_of_name(form) == block
        assert attention_block(named(name)) == block


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/encoder/blocks.3/attention/MatMul",
        "/blocks.x/attention",
        "/layer.3/fna_block_x",
        "/layer.3/my_fna_block_3",
    ],
)
def test_other_names_hold_no_block(name: str) -> None:
    assert block_of_name(name) is None
    assert attention_block(named(name)) is None


def test_only_attention_is_the_attention_of_a_block() -> None:
    assert attention_block(named(traced_node_name(4, "LandmarkRoles"))) is None
    assert attention_block(named(traced_node_name(4, f"{FNA}/core"))) == 4
    assert attention_block(named(grafted_node_name("/layer.3/MatMul", 4) + "/query")) is None


def test_scopes_are_the_traces_modules_and_none_where_a_tool_broke_them() -> None:
    node = named("node")
    assert module_scopes(node) == []
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'encoder', 'encoder.layer.3']")
    assert module_scopes(node) == ["", "encoder", "encoder.layer.3"]
    node.metadata_props[0].value = "['encoder"
    assert module_scopes(node) == []
