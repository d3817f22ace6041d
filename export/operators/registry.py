"""The ONNX operators of domain `fna`: the only list of them, and the model-local functions that make a file run anywhere.

A file that carries these functions runs on any ONNX runtime as it is; a TensorRT plugin of the operator's name can take the
function's place (`fna.export.passes.lower`). Softmax, sums and Newton-Schulz are fp32 whatever the type of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from fna.errors import InvalidArgumentError
from fna.export.operators.artifact_tokens import ARTIFACT_TOKENS
from fna.export.operators.farthest_point_sampling import FARTHEST_POINT_SAMPLING
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.guided_features import GUIDED_FEATURES
from fna.export.operators.guided_grid import GUIDED_GRID
from fna.export.operators.guided_picks import GUIDED_PICKS
from fna.export.operators.landmark_roles import LANDMARK_ROLES
from fna.export.operators.largest_norm_roles import LARGEST_NORM_ROLES
from fna.export.operators.masked_attention import MASKED_ATTENTION
from fna.export.operators.massive_tokens import MASSIVE_TOKENS
from fna.export.operators.norm_grid_landmarks import NORM_GRID_LANDMARKS
from fna.export.operators.record import DOMAIN, DOMAIN_VERSION, FunctionVariant, Operator
from fna.samplers import all_samplers

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        FAST_NYSTROM_ATTENTION,
        MASKED_ATTENTION,
        FOCAL_ATTENTION,
        FARTHEST_POINT_SAMPLING,
        NORM_GRID_LANDMARKS,
        MASSIVE_TOKENS,
        ARTIFACT_TOKENS,
        LANDMARK_ROLES,
        LARGEST_NORM_ROLES,
        GUIDED_GRID,
        GUIDED_FEATURES,
        GUIDED_PICKS,
    )
}
"""By op type."""

OVERLOAD_IR_VERSION = 10


def attach_functions(
    model: ModelProto,
    element_type: int = TensorProto.UNDEFINED,
    element_types: Mapping[str, int] | None = None,
    *,
    fused: bool = False,
    cuts: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Add to `model`, in place, the functions that its `fna` nodes call, in the model's own opset.

    Nodes that a plugin implements get the fields that TensorRT looks it up by, where they lack them.

    Where nodes of one operator need different bodies (other iterations, types or sizes), the functions are told apart by
    the `overload` field, which needs IR version 10.

    Args:
        model: holds nodes of domain `fna` in its graph.
        element_type: the ONNX type of the nodes' floating-point inputs; undefined writes bodies that take any type.
        element_types: the same for single nodes, by node name, where they differ.
        fused: with ONNX Attention inside, for a model of opset 23 or later.
        cuts: where the pieces begin and end that a node's body works in, by node name; others work in one.

    Raises:
        InvalidArgumentError: for an opset outside 14 to 24, or an operator that is not one of ours.
    """
    opset = model_opset(model)
    types = element_types or {}
    callers: dict[str, dict[FunctionVariant, list[NodeProto]]] = {}
    for node in fna_nodes(model.graph):
        variant = variant_of(node, types.get(node.name, element_type))
        if cuts:
            variant = replace(variant, cuts=cuts.get(node.name, ()))
        _add_plugin_fields(node, variant)
        callers.setdefault(node.op_type, {}).setdefault(variant, []).append(node)
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    version = 0
    for _, variants in sorted(callers.items()):
        several = len(variants) > 1
        for variant, nodes in sorted(variants.items(), key=lambda pair: pair[0].overload):
            overload = variant.overload if several else ""
            model.functions.append(variant.make_function(opset, overload, fused=fused))
            version = max(version, variant.version)
            for node in nodes:
                node.overload = overload
        if several:
            model.ir_version = max(model.ir_version, OVERLOAD_IR_VERSION)
    if version:
        _import_domain(model, version)


def variant_of(node: NodeProto, element_type: int = TensorProto.UNDEFINED) -> FunctionVariant:
    """Return what the body for a node depends on.

    Raises:
        InvalidArgumentError: if the node's operator is not one of ours, or it lacks an attribute.
    """
    operator = OPERATORS.get(node.op_type)
    if operator is None:
        raise InvalidArgumentError(
            f"node {node.name!r} is {DOMAIN}::{node.op_type}, which is not one of this project's operators"
        )
    return operator.variant(node.input, element_type, node_attributes(node), node.name)


def has_plugin(node: NodeProto) -> bool:
    """Whether a TensorRT plugin implements the operator that a node calls; the other operators are always inlined."""
    return node.domain == DOMAIN and node.op_type in plugin_operators()


def is_attention(domain: str, op_type: str) -> bool:
    """Whether an operator is the attention of a block."""
    return domain == DOMAIN and op_type in OPERATORS and OPERATORS[op_type].attends


def approximating_operators() -> tuple[str, ...]:
    """Return the op types that take the place of exact attention."""
    return tuple(operator.name for operator in OPERATORS.values() if operator.approximates)


def plugin_operators() -> tuple[str, ...]:
    """Return the op types that a TensorRT plugin implements."""
    return tuple(operator.name for operator in OPERATORS.values() if operator.plugin)


def fused_operators() -> tuple[str, ...]:
    """Return the op types that have a body with ONNX Attention inside."""
    return tuple(operator.name for operator in OPERATORS.values() if operator.fused_body)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how PyTorch's exporter writes this project's torch operators: one `fna` node each."""
    from onnxscript import values

    all_samplers()  # registers their torch operators
    opset = values.Opset(DOMAIN, DOMAIN_VERSION)

    def make_node(operator: Operator, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
        version = operator.version(["present"] * len(inputs), attributes)
        write = values.Op(opset, operator.name, operator.schema(version))
        return write(*inputs, **attributes, **operator.plugin_fields(version))

    return {
        getattr(torch.ops.fna, name).default: translation
        for operator in OPERATORS.values()
        for name, translation in operator.translations(make_node)
    }


def fna_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield every node of domain `fna`, those in subgraphs included."""
    for node in graph.node:
        if node.domain == DOMAIN:
            yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from fna_nodes(attribute.g)


def model_opset(model: ModelProto) -> int:
    """Return the version of the standard operators that `model` imports.

    Raises:
        InvalidArgumentError: if it imports none.
    """
    for imported in model.opset_import:
        if imported.domain in ("", "ai.onnx"):
            return int(imported.version)
    raise InvalidArgumentError("the model imports no standard operator set; add one to its opset_import")


def node_attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values, strings decoded."""
    values = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def node_inputs(node: NodeProto) -> dict[str, str]:
    """Return the tensors that a node of ours reads, by the operator's own names for them; absent ones are left out."""
    names = (formal.name for formal in OPERATORS[node.op_type].inputs)
    return {name: tensor for name, tensor in zip(names, node.input, strict=False) if tensor}


def _add_plugin_fields(node: NodeProto, variant: FunctionVariant) -> None:
    known = {attribute.name for attribute in node.attribute}
    for name, value in variant.operator.plugin_fields(variant.version).items():
        if name not in known:
            node.attribute.append(onnx.helper.make_attribute(name, value))


def _import_domain(model: ModelProto, version: int) -> None:
    own = [imported for imported in model.opset_import if imported.domain == DOMAIN]
    for imported in own:
        imported.version = max(imported.version, version)
    if not own:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, version))
