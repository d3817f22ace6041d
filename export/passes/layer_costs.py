"""What each linear layer of an 8-bit file costs: the file is run with every choice of layers in 8 bits, the others as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from fna.export.passes.linear import LINEAR, LinearGraph
from fna.export.passes.lower import lower
from fna.runtime import Arrays, open_session, run_session

_SWITCHES = "fna_in_eight_bits"


@dataclass(frozen=True)
class LayerCost:
    """Linear layers that share their input, and what they cost.

    Attributes:
        layers: names of their nodes.
        alone: mean cosine of the outputs, rows of the last axis, with these layers alone in 8 bits, to those with none.
        everything: the same with all layers in 8 bits.
        without: the same with all in 8 bits but these and those that cost more; None where that was not measured.
        block: that they belong to; None outside all blocks, and where blocks were not asked for.
        block_alone: the same with all layers of that block alone in 8 bits.
    """

    layers: tuple[str, ...]
    alone: float
    everything: float
    without: float | None
    block: int | None = None
    block_alone: float | None = None


def measure_layer_costs(
    model: ModelProto,
    pixels: Sequence[NDArray[np.float32]],
    output: str,
    on_layer: Callable[[int, int], None] = lambda _done, _of: None,
    *,
    most: int | None = None,
    blocks: Mapping[str, int] = MappingProxyType({}),
) -> list[LayerCost]:
    """Measure the linear layers of a file with pairs of QuantizeLinear and DequantizeLinear, the costliest alone first.

    Args:
        model: with its functions and tensors; its pairs are fp32 on both sides.
        pixels: preprocessed photographs, `[1, 3, H, W]` each.
        output: the output that is compared, `[..., C]`.
        on_layer: called with how many runs are done, and of how many.
        most: how many of the costliest are left out of 8 bits one after the other; None is all.
        blocks: of the layers by the names of their nodes, to measure each block's layers together as well.
    """
    switched, groups = _with_switches(model)
    block_of = [blocks.get(names[0]) for names in groups]
    known = sorted({block for block in block_of if block is not None})
    session = open_session(lower(switched, "onnxruntime"))
    name = next(value.name for value in session.get_inputs() if value.name != _SWITCHES)
    most = len(groups) if most is None else min(most, len(groups))
    runs = [0, len(pixels) * (2 + len(groups) + len(known) + most)]

    def run(on: NDArray[np.bool_]) -> list[NDArray[np.float32]]:
        results = []
        for image in pixels:
            inputs: Arrays = {name: image, _SWITCHES: on}
            results.append(run_session(session, inputs, [output])[output])
            runs[0] += 1
            on_layer(runs[0], runs[1])
        return results

    count = len(groups)
    exact = run(np.zeros(count, bool))
    alone = [_cosine(exact, run(np.arange(count) == index)) for index in range(count)]
    together = {block: _cosine(exact, run(np.array([other == block for other in block_of]))) for block in known}
    order = np.argsort(alone)
    on = np.ones(count, bool)
    everything = _cosine(exact, run(on))
    costs = []
    for place, index in enumerate(order):
        on[index] = False
        without = _cosine(exact, run(on)) if place < most else None
        block = block_of[index]
        of_block = None if block is None else together[block]
        costs.append(LayerCost(groups[index], alone[index], everything, without, block, of_block))
    return costs


def _cosine(exact: Sequence[NDArray[np.float32]], found: Sequence[NDArray[np.float32]]) -> float:
    cosines = []
    for one, other in zip(exact, found, strict=True):
        rows = one.reshape(-1, one.shape[-1]).astype(np.float64), other.reshape(-1, one.shape[-1]).astype(np.float64)
        norms = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
        cosines.append(float((np.sum(rows[0] * rows[1], axis=1) / np.maximum(norms, 1e-30)).mean()))
    return float(np.mean(cosines))


def _with_switches(model: ModelProto) -> tuple[ModelProto, list[tuple[str, ...]]]:
    """A copy with one more input, a switch for each tensor that enters linear layers in 8 bits; and the names of those layers."""
    result = ModelProto()
    result.CopyFrom(model)
    graph = LinearGraph(result)
    sharing: dict[str, list[int]] = {}
    for index, node in enumerate(graph.nodes):
        pairs = [graph.makers.get(tensor) for tensor in node.input[:2]]
        if node.op_type in LINEAR and all(pair is not None and pair.op_type == "DequantizeLinear" for pair in pairs):
            sharing.setdefault(node.input[0], []).append(index)
    products = {entering: [graph.nodes[index] for index in indices] for entering, indices in sharing.items()}
    groups = [tuple(str(node.name) for node in nodes) for nodes in products.values()]
    for place, (entering, nodes) in enumerate(products.items()):
        position = graph.add_constant(f"{_SWITCHES}/{place}", np.array(place), TensorProto.INT64)
        on = graph.insert("Gather", [_SWITCHES, position], f"{_SWITCHES}/{place}/on", axis=0)
        tensors = {entering, *(node.input[1] for node in nodes)}
        chosen = {tensor: _choice(graph, on, tensor) for tensor in sorted(tensors)}
        for node in nodes:
            node.input[0], node.input[1] = chosen[node.input[0]], chosen[node.input[1]]
    graph.finish()
    result.graph.input.append(helper.make_tensor_value_info(_SWITCHES, TensorProto.BOOL, [len(groups)]))
    return result, groups


def _choice(graph: LinearGraph, on: str, tensor: str) -> str:
    """The dequantised tensor where the switch is on, else what was quantised.

    Weights that another tool stored in 8 bits have nothing wider to go back to and stay.
    """
    maker = graph.makers.get(graph.makers[tensor].input[0])
    if maker is None:
        return tensor
    return graph.insert("Where", [on, tensor, maker.input[0]], f"{tensor}/switched")
