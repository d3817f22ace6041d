"""Files of two blocks of focal attention, and what PyTorch computes for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.registry import attach_functions
from fna.focal import focal_attention
from fna.focal_keys import Levels, focal_keys

PATCHES = (7, 9)
HEADS, TOKENS, SIZE = 3, 1 + 7 * 9, 16
NEAR: Levels = ((1, 0), (2, 1))
FAR: Levels = ((1, 0), (2, 1), (4, 3))
LISTS = {"tile_queries": "queries", "tile_keys": "keys", "tile_bias": "bias", "places": "places"}


def two_blocks(
    opset: int = 18,
    hot: int = 3,
    *,
    known: bool = True,
    mask: bool = False,
    tile: int = 4,
    size: int = SIZE,
    element: int = TensorProto.FLOAT,
) -> ModelProto:
    """Two focal blocks, the second with far cells as well; the lists are constants of the file, or inputs."""
    info = helper.make_tensor_value_info
    inputs = [info(name, element, ["B", HEADS, TOKENS, size]) for name in ("query", "key", "value")]
    masks = [info("key_mask", TensorProto.INT32, ["B", TOKENS])] if mask else []
    lists, nodes = [], []
    for number, levels in enumerate((NEAR, FAR)):
        made = focal_keys(PATCHES, 1, tile, levels, number)
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
        [info("out", element, ["B", HEADS, TOKENS, size])],
        lists if known else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    attach_functions(model, element)
    return model


def tensors(mask: bool = False, size: int = SIZE) -> dict[str, Any]:
    """Queries, keys and values of two images, and a mask of each."""
    random = np.random.default_rng(3)
    made: dict[str, Any] = {
        name: random.standard_normal((2, HEADS, TOKENS, size), np.float32) for name in ("query", "key", "value")
    }
    return made | ({"key_mask": (random.random((2, TOKENS)) < 0.3).astype(np.int32)} if mask else {})


def twin(inputs: dict[str, Any], hot: int, tile: int = 4) -> Any:
    """What the two blocks compute, by PyTorch."""
    query, key, value = (torch.from_numpy(inputs[name]) for name in ("query", "key", "value"))
    mask = torch.from_numpy(inputs["key_mask"]) if "key_mask" in inputs else None
    for number, levels in enumerate((NEAR, FAR)):
        query = focal_attention(
            query, key, value, patches=PATCHES, prefix_tokens=1, tile=tile, levels=levels, hot=hot, seed=number, scale=0.25,
            key_mask=mask,
        )  # fmt: skip
    return query.numpy()
