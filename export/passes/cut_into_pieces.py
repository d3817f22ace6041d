"""Focal attention in pieces, for a processor: what one operator writes the next finds in the caches.

In one piece the keys, values and scores of all tiles are written to memory and read back between operators. In pieces a block of
tiles of 8 takes a seventh to a third less time, one of tiles of 4 a third to nearly half (docs/notes/benchmarks.md); a GPU would
rather have one.
"""

from __future__ import annotations

import math

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from fna.export.operators.registry import attach_functions, fna_nodes, node_attributes, node_inputs
from fna.export.types import static_shapes

PIECE_BYTES = 5 * 2**20
"""Of a piece's keys and values, fp32: some of a processor's third-level cache. Less takes as long, twice as much a little longer."""

FLOAT_BYTES = 4

USUAL_WIDTH = 6 * 64
"""Heads times head size where the file does not say them."""


def cut_into_pieces(model: ModelProto, inferred: GraphProto) -> ModelProto:
    """Return a copy whose FocalAttention nodes call functions that work through their tiles in pieces.

    Args:
        model: whose only `fna` nodes call FocalAttention; those without a name stay as they are. Tensors may be left out.
        inferred: the model's graph as inference annotates it, with all functions there.
    """
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    shapes = static_shapes(values)
    shapes |= {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    nodes = list(fna_nodes(model.graph))
    types = {node.name: max(kinds.get(name, TensorProto.UNDEFINED) for name in node.input[:3]) for node in nodes}
    cut = ModelProto()
    cut.CopyFrom(model)
    attach_functions(cut, element_types=types, cuts={node.name: _cuts(node, shapes) for node in nodes if node.name})
    return cut


def _cuts(node: NodeProto, shapes: dict[str, list[int]]) -> tuple[int, ...]:
    """Where the pieces of a node's tiles begin and end; empty for one piece, or where the lists are not known."""
    names = node_inputs(node)
    tiles, keys = (shapes.get(names["tile_keys"], []) + [0, 0])[:2]
    key = shapes.get(names["key"], [])
    width = key[1] * key[3] if len(key) == len("BHND") else 0
    keys += int(node_attributes(node).get("hot", 0))
    size = 2 * FLOAT_BYTES * tiles * keys * (width or USUAL_WIDTH)
    pieces = min(tiles, math.ceil(size / PIECE_BYTES))
    return tuple(tiles * piece // pieces for piece in range(pieces + 1)) if pieces > 1 else ()
