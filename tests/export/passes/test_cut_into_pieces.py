"""Focal attention in pieces computes what it computes in one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from operator_files import run

from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.registry import attach_functions
from fna.export.passes import cut_into_pieces as module
from fna.export.passes.lower import lower
from fna.export.types import static_shapes
from fna.focal import focal_attention
from fna.focal_keys import Levels, focal_keys

PATCHES = (7, 9)
HEADS, TOKENS, SIZE = 3, 1 + 7 * 9, 16
NEAR: Levels = ((1, 0), (2, 1))
FAR: Levels = ((1, 0), (2, 1), (4, 3))
LISTS = {"tile_queries": "queries", "tile_keys": "keys", "tile_bias": "bias", "places": "places"}


def two_blocks(opset: int = 18, hot: int = 3, *, known: bool = True, mask: bool = False) -> ModelProto:
    """Two focal blocks, the second with far cells as well; the lists are constants of the file, or inputs."""
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.FLOAT, ["B", HEADS, TOKENS, SIZE]) for name in ("query", "key", "value")]
    masks = [info("key_mask", TensorProto.INT32, ["B", TOKENS])] if mask else []
    lists, nodes = [], []
    for number, levels in enumerate((NEAR, FAR)):
        made = focal_keys(PATCHES, 1, 4, levels, number)
        constants = {f"{name}_{number}": np.asarray(getattr(made, kept)) for name, kept in LISTS.items()}
        lists += [numpy_helper.from_array(array, name) for name, array in constants.items()]
        operands = ["middle" if number else "query", "key", "value", *constants, *(["key_mask"] if mask else [])]
        out = "out" if number else "middle"
        settings = {"scale": 0.25, "prefix_tokens": 1, "hot": hot}
        nodes.append(FOCAL_ATTENTION.make_node(operands, [out], f"/blocks.{number}/focal", **settings))
    if not known:
        inputs += [info(tensor.name, tensor.data_type, [None] * len(tensor.dims)) for tensor in lists]
    graph = helper.make_graph(
        nodes,
        "g",
        [*inputs, *masks],
        [info("out", TensorProto.FLOAT, ["B", HEADS, TOKENS, SIZE])],
        lists if known else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    attach_functions(model, TensorProto.FLOAT)
    return model


def tensors(mask: bool = False) -> dict[str, Any]:
    random = np.random.default_rng(3)
    made: dict[str, Any] = {
        name: random.standard_normal((2, HEADS, TOKENS, SIZE), np.float32) for name in ("query", "key", "value")
    }
    return made | ({"key_mask": (random.random((2, TOKENS)) < 0.3).astype(np.int32)} if mask else {})


def twin(inputs: dict[str, Any], hot: int) -> Any:
    query, key, value = (torch.from_numpy(inputs[name]) for name in ("query", "key", "value"))
    mask = torch.from_numpy(inputs["key_mask"]) if "key_mask" in inputs else None
    for number, levels in enumerate((NEAR, FAR)):
        query = focal_attention(
            query, key, value, patches=PATCHES, prefix_tokens=1, tile=4, levels=levels, hot=hot, seed=number, scale=0.25,
            key_mask=mask,
        )  # fmt: skip
    return query.numpy()


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
