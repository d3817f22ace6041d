"""8 bits for the linear layers: static quantisation with calibration photographs.

Weights are quantised per output channel, activations per tensor, both symmetric, as TensorRT wants them, and written as pairs of
QuantizeLinear and DequantizeLinear around fp32 weights. Attention (FNA and exact), convolutions and norms are left as they are. What
enters each layer is equalised before (`fna.export.passes.equalise`), and the mean error of its output is taken off its bias after.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from fna.errors import InvalidArgumentError
from fna.export.metadata import FileMetadata, read_metadata, write_metadata
from fna.export.operators.registry import attach_functions, model_opset
from fna.export.passes.calibration import InputStatistics, measure_inputs
from fna.export.passes.eight_bit import INT8, SMALLEST_SCALE, EightBit, quantized_types
from fna.export.passes.equalise import equalise, find_freedom
from fna.export.passes.linear import LinearGraph, LinearLayer, find_linear_layers
from fna.export.passes.raise_opset import raise_opset
from fna.export.passes.recipe import (
    ROWS_FOR_ROUNDING,
    Candidate,
    choose,
    move_rows,
    round_weight_in_turn,
    weight_scale,
)


@dataclass(frozen=True)
class Quantized:
    """A file in 8 bits.

    Attributes:
        model: the file.
        types: of the linear layers that compute in 8 bits, by name.
        share: of the linear layers' multiply-adds, that are in 8 bits.
        notes: what the user should know, a line each.
    """

    model: ModelProto
    types: dict[str, str]
    share: float
    notes: tuple[str, ...]

    def describe(self) -> str:
        """Say how much computes in which type."""
        counts = Counter(self.types.values())
        layers = ", ".join(f"{count} in {kind}" for kind, count in sorted(counts.items(), reverse=True))
        return f"linear layers: {layers}; {100 * self.share:.1f} % of their multiply-adds in 8 bits"


def quantize_model(
    model: ModelProto,
    pixels: Sequence[NDArray[np.float32]],
    *,
    kinds: Sequence[EightBit] = (INT8,),
    keep: Sequence[int] = (),
    keep_layers: Sequence[str] = (),
    name: str = "the file",
) -> Quantized:
    """Return a copy of an fp32 FNA file whose linear layers compute in 8 bits.

    Args:
        model: with its tensors loaded.
        pixels: preprocessed photographs, `[V, 3, H, W]` each, one view or several; what enters the layers is measured on them.
        kinds: the 8-bit types; of several each layer gets the one that its output bears best.
        keep: numbers of blocks whose linear layers stay as they are.
        keep_layers: names of linear layers that stay as they are, and with them those that share their input.
        name: says in errors which file it was.

    Raises:
        InvalidArgumentError: if the file is not fp32, is quantised already, has no such block or layer, its values are not finite, or
            there are no photographs.
    """
    metadata = read_metadata(model, name)
    _check(model, metadata, pixels, keep, name)
    result = _at_opset(model, max(kind.opset for kind in kinds))
    graph = LinearGraph(result)
    layers = find_linear_layers(graph, result, metadata.plan.num_blocks)
    inputs = _inputs_of(layers, keep, keep_layers, name)
    sizes = {layer.name: graph.weight(layer).size for layer in layers}
    channels = {source: len(graph.weight(sharing[0])) for source, sharing in inputs.items()}
    statistics = measure_inputs(result, channels, pixels, ROWS_FOR_ROUNDING, name)
    chosen: dict[str, Candidate] = {}
    notes: list[str] = []

    def choose_for(source: str) -> Candidate:
        weights = [graph.weight(layer) for layer in inputs[source]]
        return choose(kinds, statistics[source], weights, find_freedom(graph, source, inputs[source]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        candidates = dict(zip(inputs, pool.map(choose_for, inputs), strict=True))
    for source, candidate in candidates.items():
        if candidate.largest < SMALLEST_SCALE * candidate.kind.largest:
            named = ", ".join(layer.name for layer in inputs[source])
            notes.append(
                f"{named} stays as it is: what enters is zero on all photographs, or too small to have a scale"
            )
            continue
        chosen[source] = candidate
    entering = {
        source: equalise(graph, source, inputs[source], candidate.equalisation) for source, candidate in chosen.items()
    }
    for source, candidate in chosen.items():
        _quantize(graph, entering[source], inputs[source], candidate, statistics[source])
    graph.finish()
    types: dict[str, str] = {
        layer.name: candidate.kind.name for source, candidate in chosen.items() for layer in inputs[source]
    }
    if not types:
        raise InvalidArgumentError(f"{name} has no linear layer that could be quantised: {notes[0]}")
    write_metadata(result, metadata.model_copy(update={"quantized": quantized_types(result)}))
    return Quantized(result, types, sum(sizes[layer] for layer in types) / sum(sizes.values()), tuple(notes))


def _at_opset(model: ModelProto, opset: int) -> ModelProto:
    """A copy of a file, at a later opset where it must be, its functions written anew."""
    result = ModelProto()
    result.CopyFrom(model)
    if model_opset(model) >= opset:
        return result
    del result.functions[:]
    result = raise_opset(result, opset)
    attach_functions(result, TensorProto.FLOAT)
    return result


def _check(
    model: ModelProto,
    metadata: FileMetadata,
    pixels: Sequence[NDArray[np.float32]],
    keep: Sequence[int],
    name: str,
) -> None:
    quantizes = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if metadata.precision != "fp32" or metadata.quantized is not None or quantizes:
        kind = metadata.quantized or ("quantised" if quantizes else metadata.precision)
        raise InvalidArgumentError(f"{name} is {kind} already; quantise the fp32 file that it came from")
    if not pixels:
        raise InvalidArgumentError("8 bits need photographs to calibrate on, but there are none; give --images")
    count = metadata.plan.num_blocks
    wrong = [number for number in keep if not 0 <= number < count]
    if wrong:
        raise InvalidArgumentError(f"block {wrong[0]} is to be kept, but the model has blocks 0 to {count - 1}")


def _inputs_of(
    layers: Sequence[LinearLayer], keep: Sequence[int], keep_layers: Sequence[str], name: str
) -> dict[str, list[LinearLayer]]:
    """The layers to quantise, by the tensor that enters them."""
    unknown = sorted({*keep_layers} - {layer.name for layer in layers})
    if unknown:
        raise InvalidArgumentError(
            f"linear layer {unknown[0]!r} is to be kept, but {name} has none of that name; fna validate names them"
        )
    inputs: dict[str, list[LinearLayer]] = {}
    for layer in layers:
        inputs.setdefault(layer.source, []).append(layer)
    inputs = {
        source: sharing
        for source, sharing in inputs.items()
        if not any(layer.block in keep or layer.name in keep_layers for layer in sharing)
    }
    if not inputs:
        raise InvalidArgumentError(f"{name} has no linear layers with constant weights to quantise")
    return inputs


def _quantize(
    graph: LinearGraph,
    tensor: str,
    layers: Sequence[LinearLayer],
    candidate: Candidate,
    statistics: InputStatistics,
) -> None:
    """Write the pairs around a tensor and the weights that it meets, and take the mean error off the biases."""
    kind, scale = candidate.kind, candidate.kind.scale(np.asarray(candidate.largest))
    entering = _pair(graph, tensor, kind, scale)
    moved = move_rows(candidate.equalisation, statistics.rows)
    rounded = kind.round(moved, scale)
    means = [rows.mean(axis=(0, 1), dtype=np.float64) for rows in (moved, rounded)]
    weights = [graph.weight(layer) for layer in layers]
    together = round_weight_in_turn(kind, np.concatenate(weights, axis=1), rounded.reshape(-1, len(weights[0])))
    ends = np.cumsum([weight.shape[1] for weight in weights])[:-1]
    for layer, weight, rounded_weight in zip(layers, weights, np.split(together, ends, axis=1), strict=True):
        graph.set_weight(layer, rounded_weight)
        graph.add_to_bias(layer, means[0] @ weight - means[1] @ rounded_weight)
        layer.node.input[0] = entering
        axis = 0 if layer.is_transposed else 1
        layer.node.input[1] = _pair(graph, layer.node.input[1], kind, weight_scale(kind, weight), axis=axis)


def _pair(graph: LinearGraph, tensor: str, kind: EightBit, scale: NDArray[np.float32], **attributes: int) -> str:
    """Quantise and dequantise a tensor, and return the result's name; `scale` is one number, or one for each channel."""
    parameters = [
        graph.add_constant(f"{tensor}/scale", scale),
        graph.add_constant(f"{tensor}/zero_point", np.zeros(scale.shape), kind.kind),
    ]
    quantized = graph.insert("QuantizeLinear", [tensor, *parameters], f"{tensor}/quantized", **attributes)
    return graph.insert("DequantizeLinear", [quantized, *parameters], f"{tensor}/dequantized", **attributes)
