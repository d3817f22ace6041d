"""Focal attention in pieces computes what it computes in one."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from focal_files import FAR, HEADS, NEAR, PATCHES, SIZE, tensors, twin, two_blocks
from onnx import ModelProto
from operator_files import run

from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.passes import cut_into_pieces as module
from fna.export.passes.lower import lower
from fna.export.types import static_shapes
from fna.focal_keys import focal_keys


def pieces(model: ModelProto) -> list[int]:
    """Tiles of each piece, block after block."""
    sizes = static_shapes(onnx.shape_inference.infer_shapes(model).graph.value_info)
    return [sizes[node.output[0]][2] for node in model.graph.node if node.name.split("/")[-1].startswith("key_tiles")]


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "a mask"])
@pytest.mark.parametrize("hot", [0, 3])
@pytest.mark.parametrize("opset", range(LOWEST_OPSET, HIGHEST_OPSET + 1))
def test_in_pieces_it_equals_pytorch(opset: int, hot: int, mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 20_000)
    cut = lower(two_blocks(opset, hot, mask=mask), "onnxruntime-cpu")
    assert not cut.functions
    assert {node.domain for node in cut.graph.node} == {""}
    inputs = tensors(mask)
    np.testing.assert_allclose(run(cut, inputs)[0], twin(inputs, hot), rtol=0, atol=4e-6)


@pytest.mark.parametrize("size", [8_000, 20_000, 50_000])
def test_a_piece_has_as_many_tiles_as_its_bytes_allow(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", size)
    found = pieces(lower(two_blocks(hot=3), "onnxruntime-cpu"))
    tiles, near = focal_keys(PATCHES, 1, 4, NEAR, 0).keys.shape
    far = focal_keys(PATCHES, 1, 4, FAR, 1).keys.shape[1]
    assert sum(found) == 2 * tiles
    first = next(count for count in range(1, len(found)) if sum(found[:count]) == tiles)
    for parts, keys in ((found[:first], near + 3), (found[first:], far + 3)):
        a_tile = 2 * 4 * keys * HEADS * SIZE
        assert len(parts) == min(tiles, -(-tiles * a_tile // size))
        assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize("known", [True, False], ids=["small lists", "lists that are inputs"])
def test_lists_that_are_small_or_not_known_stay_in_one_piece(known: bool) -> None:
    model = two_blocks(known=known)
    assert [node.op_type for node in lower(model, "onnxruntime-cpu").graph.node] == [
        node.op_type for node in lower(model, "portable").graph.node
    ]


def test_the_file_itself_and_its_other_forms_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 8_000)
    model = two_blocks()
    before = model.SerializeToString(deterministic=True)
    assert len(lower(model, "onnxruntime-cpu").graph.node) > len(lower(model, "onnxruntime").graph.node)
    assert model.SerializeToString(deterministic=True) == before
    assert len(lower(model, "onnxruntime").graph.node) == len(lower(model, "portable").graph.node)


def test_names_of_nodes_and_values_occur_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 8_000)
    nodes = lower(two_blocks(), "onnxruntime-cpu").graph.node
    names = [node.name for node in nodes if node.name]
    values = list(itertools.chain.from_iterable(node.output for node in nodes))
    assert len(set(names)) == len(names)
    assert len(set(values)) == len(values)
    assert all(name.startswith(("/blocks.0/focal/", "/blocks.1/focal/")) for name in names)
