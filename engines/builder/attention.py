"""ONNX Attention in the form that TensorRT takes, and the attention layers of its network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from fna.errors import BuildError
from fna.export.types import infer_types

_REFUSED = "softmax_precision"
_BIAS = 3
"""The input of Attention that is added to the scores."""


def prepare_attention(model: ModelProto) -> ModelProto:
    """Return a model whose Attention nodes TensorRT takes: scaled queries, no precision of the softmax, a bias as small as it is.

    Without any such node, the model itself. TensorRT-RTX 1.7.1 refuses the attribute `softmax_precision`, and its kernels' softmax is
    fp32 whatever it says. It would scale both query and key; where those are made from one tensor, they are then equal to its
    builder, which ends the process (tried). A bias that is expanded to a row for each query, as onnxruntime needs it, would be read
    in full, and where it is constant and large (1370 rows of 128) the builder fails on it in fp32 (tried); one row is enough.
    """
    attentions = _attentions(model)
    if not attentions:
        return model
    inferred = infer_types(model)
    values = {value.name: value.type.tensor_type for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    makers = {output: node for node in model.graph.node for output in node.output}
    prepared = ModelProto()
    prepared.CopyFrom(model)
    nodes: list[NodeProto] = []
    for node in prepared.graph.node:
        if node.domain == "" and node.op_type == "Attention":
            known = values.get(node.input[0])
            nodes.append(_scale_query(prepared, node, known.elem_type if known is not None else TensorProto.FLOAT))
            if len(node.input) > _BIAS and node.input[_BIAS]:
                node.input[_BIAS] = _before_expansion(node.input[_BIAS], makers, values)
        nodes.append(node)
    read = {name for node in nodes for name in node.input} | {value.name for value in prepared.graph.output}
    expansions = {node.input[_BIAS] for node in attentions if len(node.input) > _BIAS} - read
    kept = [
        NodeProto.FromString(node.SerializeToString()) for node in nodes if not expansions.intersection(node.output)
    ]
    del prepared.graph.node[:]
    prepared.graph.node.extend(kept)
    return prepared


def _before_expansion(bias: str, makers: Mapping[str, NodeProto], values: Mapping[str, TypeProto.Tensor]) -> str:
    """The tensor of four axes that a bias was expanded from, which attention broadcasts by itself; else the bias."""
    maker = makers.get(bias)
    if maker is None or maker.op_type != "Expand":
        return bias
    known = values.get(maker.input[0])
    whole = known is not None and known.HasField("shape") and len(known.shape.dim) == len("BHMN")
    return maker.input[0] if whole else bias


def allow_decomposition(trt: Any, network: Any) -> int:
    """Let the builder take several kernels for an attention that it has no single one for, fp32 above all, which it refuses otherwise.

    Returns:
        How many attention layers the network has.
    """
    if not hasattr(trt.LayerType, "ATTENTION_INPUT"):  # TensorRT before 10.14
        return 0
    count = 0
    for index in range(network.num_layers):
        network_layer = network.get_layer(index)
        if network_layer.type == trt.LayerType.ATTENTION_INPUT:
            network_layer.__class__ = trt.IAttentionInputLayer  # the bindings give the base class alone
            network_layer.attention.decomposable = True
            count += 1
    return count


def check_attention(title: str, model: ModelProto, layers: int) -> None:
    """Refuse a network that has not one attention layer for each attention of the file.

    Raises:
        BuildError: saying how many it has.
    """
    wanted = len(_attentions(model))
    if layers != wanted:
        raise BuildError(
            f"{title}'s parser made {layers} attention layers of the {wanted} in the file; build with --lowering portable"
        )


def _attentions(model: ModelProto) -> list[NodeProto]:
    return [node for node in model.graph.node if node.domain == "" and node.op_type == "Attention"]


def _scale_query(model: ModelProto, node: NodeProto, element_type: int) -> NodeProto:
    """Return a node that scales an attention's queries, which the attention then leaves as they are."""
    scale = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
    kept = [attribute for attribute in node.attribute if attribute.name not in (_REFUSED, "scale")]
    attributes = [type(attribute).FromString(attribute.SerializeToString()) for attribute in kept]
    del node.attribute[:]
    node.attribute.extend([*attributes, helper.make_attribute("scale", 1.0)])
    factor, scaled = f"{node.output[0]}/scale", f"{node.output[0]}/scaled_query"
    value = np.asarray(scale, helper.tensor_dtype_to_np_dtype(element_type))
    model.graph.initializer.append(numpy_helper.from_array(value, factor))
    product = helper.make_node("Mul", [node.input[0], factor], [scaled], name=f"{node.name}/scaled_query")
    node.input[0] = scaled
    return product
