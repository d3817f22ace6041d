"""Casting an ONNX file to fp16 or bf16, around ONNX Runtime's own converter.

What stays fp32: inputs and outputs, softmax, norms, FNA's insides and its landmark bias, blocks that the user names, everything that
does not depend on the pixels (shapes computed as floats, position embeddings), and operators that the opset has no 16-bit form of.

ONNX Runtime's converter (`onnxruntime.transformers.float16`) decides where casts go. It knows fp16 only; for bf16 the tensors
that it made fp16 are made bf16 instead, from the fp32 values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from fna.errors import InvalidArgumentError
from fna.export.blocks import find_blocks
from fna.export.metadata import read_metadata, write_metadata
from fna.export.operators.record import DOMAIN
from fna.export.operators.registry import OPERATORS, attach_functions, fna_nodes, model_opset
from fna.export.types import ONNX_TYPES, infer_types

HalfPrecision = Literal["fp16", "bf16"]
FP16_LARGEST = 65504.0

NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "LpNormalization")
KEPT_OPERATORS = ("Softmax", "LogSoftmax", *NORMS, "QuantizeLinear", "DequantizeLinear")
_NORM_STEPS = ("Sub", "Pow", "Mul", "Cast", "ReduceMean", "Add", "Sqrt", "Div", "Reciprocal")


def cast_model(
    model: ModelProto,
    precision: HalfPrecision,
    *,
    keep_fp32: Sequence[int] = (),
    keep_io: bool = True,
    name: str = "the file",
) -> ModelProto:
    """Return a copy of an fp32 FNA file whose weights and activations are `precision`.

    Args:
        model: with its tensors loaded; traced or grafted, opset 14 to 24.
        precision: the 16-bit type.
        keep_fp32: numbers of blocks that stay fp32, attention, norms and MLP.
        keep_io: whether inputs and outputs stay fp32.
        name: says in errors which file it was.

    Raises:
        InvalidArgumentError: if the file is not fp32, or has no such blocks.
        InputFileError: if it was not written by this project.
    """
    from onnxruntime.transformers import float16

    metadata = read_metadata(model, name)
    if metadata.precision != "fp32":
        raise InvalidArgumentError(f"{name} is {metadata.precision} already; cast the fp32 file that it came from")
    result = ModelProto()
    result.CopyFrom(model)
    _move_constants_to_initializers(result)
    _name_nodes(result)
    kept_blocks = _blocks_of(result, keep_fp32, metadata.plan.num_blocks)
    biases = _detach_biases(result)
    originals = {tensor.name: tensor for tensor in result.graph.initializer}
    inferred = infer_types(result)
    del result.graph.value_info[:]
    result.graph.value_info.extend(inferred.value_info)
    fp32_values = {key: numpy_helper.to_array(tensor) for key, tensor in originals.items() if _is_float(tensor)}
    result = float16.convert_float_to_float16(
        result,
        keep_io_types=keep_io,
        disable_shape_infer=True,  # done above; its own fails on large files
        op_block_list=sorted({*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_OPERATORS, *_without_half(result, precision)}),
        node_block_list=sorted(
            {*kept_blocks, *norm_nodes(result), *_pixel_independent(result), *_quantized_nodes(result)}
        ),
    )
    _attach_biases(result, biases)
    if precision == "bf16":
        _make_bfloat16(result, fp32_values)
    _join_casts(result)
    _sort(result)
    _set_softmax_precision(result)
    half = ONNX_TYPES[precision]
    attach_functions(
        result, half, {node.name: TensorProto.FLOAT for node in fna_nodes(result.graph) if node.name in kept_blocks}
    )
    del result.graph.value_info[:]  # of the fp32 graph; names and types have changed
    write_metadata(
        result, metadata.model_copy(update={"precision": precision, "fp32_blocks": tuple(sorted(set(keep_fp32)))})
    )
    return result


def norm_nodes(model: ModelProto) -> set[str]:
    """Return the names of the nodes of norms that are written out: mean, difference, square, mean, root, quotient.

    The square of a difference above 256 overflows fp16, and massive tokens have such.
    """
    nodes = list(model.graph.node)
    consumers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for value in node.input:
            consumers.setdefault(value, []).append(node)
    names: set[str] = set()
    for node in nodes:
        if node.op_type != "ReduceMean":
            continue
        steps, waiting, whole = {node.name}, [node], False
        while waiting:
            for follower in consumers.get(waiting.pop().output[0], []):
                if follower.name in steps or follower.op_type not in _NORM_STEPS:
                    continue
                steps.add(follower.name)
                if follower.op_type in ("Div", "Reciprocal"):
                    whole = True
                    continue
                waiting.append(follower)
                whole = whole or follower.op_type == "Sqrt"
        if whole:
            names |= steps
    return names


def _blocks_of(model: ModelProto, keep: Sequence[int], num_blocks: int) -> set[str]:
    """Names of all nodes of the blocks that are kept."""
    wrong = [number for number in keep if not 0 <= number < num_blocks]
    if wrong:
        raise InvalidArgumentError(f"block {wrong[0]} is to stay fp32, but the model has blocks 0 to {num_blocks - 1}")
    if not keep:
        return set()
    blocks = find_blocks(model, num_blocks)
    return {node.name for node in model.graph.node if node.output and blocks.get(node.output[0]) in keep}


def _pixel_independent(model: ModelProto) -> set[str]:
    """Names of the nodes whose values follow from constants and shapes alone."""
    depends = {value.name for value in model.graph.input}
    independent = set()
    for node in model.graph.node:
        if node.op_type in ("Shape", "Size"):
            continue
        if any(value in depends for value in node.input):
            depends.update(node.output)
        else:
            independent.add(node.name)
    return independent


def _quantized_nodes(model: ModelProto) -> set[str]:
    """Products of dequantised values, with their biases: TensorRT joins them to one int8 layer if no cast is between."""
    constant = {tensor.name for tensor in model.graph.initializer}
    values = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    names, products = set(), set()
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and any(value in values for value in node.input):
            names.add(node.name)
            products.add(node.output[0])
        elif node.op_type == "Add" and {*node.input} & products and {*node.input} & constant:
            names.add(node.name)
    return names


def _without_half(model: ModelProto, precision: HalfPrecision) -> set[str]:
    """Operators of the file that take fp32, and in this opset no tensor of the 16-bit type."""
    opset = model_opset(model)
    wanted = "tensor(float16)" if precision == "fp16" else "tensor(bfloat16)"
    without = set()
    for op_type in {node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}:
        schema = onnx.defs.get_schema(op_type, opset, "")
        types = {
            kind: set(constraint.allowed_type_strs)
            for constraint in schema.type_constraints
            for kind in [constraint.type_param_str]
        }
        floating = [allowed for allowed in types.values() if "tensor(float)" in allowed]
        if any(wanted not in allowed for allowed in floating):
            without.add(op_type)
    return without


def _detach_biases(model: ModelProto) -> dict[str, str]:
    """Take the biases, which operators want in fp32 always, out of the converter's sight; by node name."""
    taken = {}
    for node in fna_nodes(model.graph):
        place = _bias_place(node)
        if place is not None:
            taken[node.name] = node.input[place]
            node.input[place] = ""
    return taken


def _bias_place(node: NodeProto) -> int | None:
    """Where a node has its input of fixed type FLOAT; no operator has two."""
    formals = OPERATORS[node.op_type].inputs[: len(node.input)]
    return next((place for place, formal in enumerate(formals) if formal.type == "FLOAT"), None)


def _attach_biases(model: ModelProto, biases: dict[str, str]) -> None:
    half = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    half |= {node.output[0] for node in model.graph.node if _cast_target(node) == TensorProto.FLOAT16}
    casts: dict[str, str] = {}
    for node in list(fna_nodes(model.graph)):
        bias = biases.get(node.name)
        place = _bias_place(node)
        if bias is None or place is None:
            continue
        if bias in half and bias not in casts:  # something else uses it too, in 16 bits
            casts[bias] = f"{bias}_as_bias"
            model.graph.node.add(op_type="Cast", name=casts[bias], input=[bias], output=[casts[bias]])
            model.graph.node[-1].attribute.append(onnx.helper.make_attribute("to", TensorProto.FLOAT))
        node.input[place] = casts.get(bias, bias)


def _move_constants_to_initializers(model: ModelProto) -> None:
    """So that the converter keeps those in fp32 that fp32 nodes use; it converts every Constant node."""
    kept = []
    for node in model.graph.node:
        value = next((attribute for attribute in node.attribute if attribute.name == "value"), None)
        if node.op_type != "Constant" or value is None:
            kept.append(node)
            continue
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(value.t)
        tensor.name = node.output[0]
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in kept]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _name_nodes(model: ModelProto) -> None:
    """Give every node a name of its own; the converter's list goes by name."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}#{index}"
        taken.add(node.name)


def _make_bfloat16(model: ModelProto, fp32_values: dict[str, np.ndarray]) -> None:
    """Make bf16 of all that the converter made fp16."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            values = fp32_values.get(tensor.name)
            values = numpy_helper.to_array(tensor) if values is None else values
            tensor.CopyFrom(numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT16:
                values = numpy_helper.to_array(attribute.t).astype(ml_dtypes.bfloat16)
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))


def _join_casts(model: ModelProto) -> None:
    """Let fp32 nodes hand fp32 to each other; the converter casts to 16 bits and back between them, which can overflow."""
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    producers = {name: node for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    replaced = {}
    for node in model.graph.node:
        if _cast_target(node) == TensorProto.FLOAT and node.output[0] not in outputs:
            source = producers.get(node.input[0])
            if source is not None and _cast_target(source) in halves and source.name.endswith("_cast_to_fp16_node"):
                replaced[node.output[0]] = source.input[0]
    for node in model.graph.node:
        for index, value in enumerate(node.input):
            if value in replaced:
                node.input[index] = replaced[value]
    _drop_unused(model, outputs)


def _drop_unused(model: ModelProto, outputs: set[str]) -> None:
    used = outputs | {value for node in model.graph.node for value in node.input}
    nodes = [node for node in model.graph.node if _cast_target(node) is None or node.output[0] in used]
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    again = len(kept) < len(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    if again:
        _drop_unused(model, outputs)


def _sort(model: ModelProto) -> None:
    from onnxruntime.transformers.onnx_model import OnnxModel

    OnnxModel.graph_topological_sort(model.graph, is_deterministic=True)


def _set_softmax_precision(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
            kept = [attribute for attribute in node.attribute if attribute.name != "softmax_precision"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("softmax_precision", TensorProto.FLOAT)])


def _cast_target(node: NodeProto) -> int | None:
    if node.op_type != "Cast" or node.domain == DOMAIN:
        return None
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "to"), None)


def _is_float(tensor: TensorProto) -> bool:
    return bool(tensor.data_type == TensorProto.FLOAT)
