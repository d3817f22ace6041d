"""Seven forms of a file with `fna` nodes: `portable` (standard operators only), `fused` (with ONNX Attention for every product with N
rows), `decomposed` (exact attention as TensorRT without such an operator fuses it), `plugin` (custom nodes for TensorRT, and the
same), `onnxruntime` (with onnxruntime's own MultiHeadAttention), `onnxruntime-cpu` (with focal attention in pieces, besides) and
`onnxruntime-kernels` (with FNA and focal attention as operators of this project's library for processors).

Builders lower by themselves and never leave it to a parser: TensorRT up to 10.6 takes a function's body although a plugin
of the same name is registered, from 10.7 on it takes the plugin.
"""

from __future__ import annotations

import onnx.inliner
from onnx import FunctionProto, ModelProto, TensorProto, helper

from fna.errors import InvalidArgumentError
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.onnx_attention import ATTENTION_OPSET
from fna.export.operators.record import DOMAIN
from fna.export.operators.registry import (
    attach_functions,
    fna_nodes,
    fused_operators,
    model_opset,
    plugin_operators,
)
from fna.export.passes import KERNEL_FORM, LOWERINGS, Lowering
from fna.export.passes.cut_into_pieces import cut_into_pieces
from fna.export.passes.fuse_exact import decompose_exact_attention, fuse_exact_attention
from fna.export.passes.multi_head_attention import ONNXRUNTIME_DOMAIN, fuse_multi_head_attention
from fna.export.passes.processor_kernels import name_processor_kernels
from fna.export.passes.raise_opset import raise_opset
from fna.export.types import infer_types, tensor_types


def lower(model: ModelProto, lowering: Lowering, *, fuse_exact: bool = False) -> ModelProto:
    """Return a lowered copy of `model`; metadata and external-data references are kept.

    Args:
        model: with `fna` nodes and their functions. Load files with external data by `load_external_data=False`.
        lowering: `portable` inlines every function; `fused` inlines bodies with ONNX Attention, raises the file to opset 23
            where it is below, and fuses the exact attention of files that this project traced; `plugin` keeps the nodes that a
            plugin implements and strips their functions; `decomposed` inlines every function; both write the exact attention of
            traced files as TensorRT's own fusion knows it; `onnxruntime` inlines every function and makes the exact attention of files
            that this project traced onnxruntime's own operator; `onnxruntime-cpu` is that with focal attention cut into pieces that
            stay in a processor's caches; `onnxruntime-kernels` is `onnxruntime` with FNA and focal attention in fp32 as one node
            each, which runs with the library of `fna.plugins.processor_library` alone.
        fuse_exact: treat exact attention of grafted files, which otherwise stays as it came, like that of traced ones.

    Raises:
        InvalidArgumentError: for another lowering, or for a model whose `fna` nodes have no functions to inline.
    """
    if lowering not in LOWERINGS:
        raise InvalidArgumentError(
            f"lowering {lowering!r} is not known; choose {', '.join(LOWERINGS[:-1])} or {LOWERINGS[-1]}"
        )
    known = {(function.domain, function.name) for function in model.functions}
    for node in fna_nodes(model.graph):
        if (
            not (lowering == "plugin" and node.op_type in plugin_operators())
            and (node.domain, node.op_type) not in known
        ):
            raise InvalidArgumentError(
                f"node {node.name!r} is fna::{node.op_type}, but the file carries no function for it; "
                "start from the file that fna export or fna graft wrote, not from a plugin-lowered one"
            )
    if lowering == "fused":
        return _fused(model, fuse_exact)
    if lowering == "onnxruntime":
        return _own_operators(model)
    if lowering == "onnxruntime-cpu":
        return _own_operators(_in_pieces(model))
    if lowering == KERNEL_FORM:
        return _own_operators(_in_pieces(name_processor_kernels(model)))
    if lowering == "portable":
        return _inlined(model, ())
    types = tensor_types(model)
    lowered = _inlined(model, plugin_operators() if lowering == "plugin" else ())
    if fuse_exact or _was_traced(lowered):
        decompose_exact_attention(lowered.graph, types)
    return lowered


def _fused(model: ModelProto, fuse_exact: bool) -> ModelProto:
    types = tensor_types(model)
    waiting = _inlined(model, fused_operators())
    if model_opset(waiting) < ATTENTION_OPSET:
        waiting = raise_opset(waiting, ATTENTION_OPSET)
    kinds = {node.name: types.get(node.input[0], TensorProto.UNDEFINED) for node in fna_nodes(waiting.graph)}
    attach_functions(waiting, element_types=kinds, fused=True)
    fused = _inlined(waiting, ())
    if fuse_exact or _was_traced(fused):
        fuse_exact_attention(fused.graph)
    return fused


def _own_operators(model: ModelProto) -> ModelProto:
    lowered = _inlined(model, ())
    if _was_traced(lowered) and fuse_multi_head_attention(lowered.graph):
        lowered.opset_import.append(helper.make_opsetid(ONNXRUNTIME_DOMAIN, 1))
    return lowered


def _in_pieces(model: ModelProto) -> ModelProto:
    if not any(FOCAL_ATTENTION.is_called_by(node) for node in fna_nodes(model.graph)):
        return model
    return cut_into_pieces(_inlined(model, (FOCAL_ATTENTION.name,)), infer_types(model))


def _was_traced(model: ModelProto) -> bool:
    return any((pair.key, pair.value) == ("fna.origin", "trace") for pair in model.metadata_props)


def _inlined(model: ModelProto, kept: tuple[str, ...]) -> ModelProto:
    bodies = {(body.domain, body.name, body.overload): body for body in model.functions}
    lowered = onnx.inliner.inline_selected_functions(model, [(DOMAIN, name) for name in kept], exclude=True)
    _name_inlined_nodes(model, lowered, kept, bodies)
    del lowered.functions[:]
    for node in fna_nodes(lowered.graph):
        node.ClearField("overload")
    if not any(True for _ in fna_nodes(lowered.graph)):
        used = [imported for imported in lowered.opset_import if imported.domain != DOMAIN]
        del lowered.opset_import[:]
        lowered.opset_import.extend(used)
    return lowered


def _name_inlined_nodes(
    model: ModelProto,
    lowered: ModelProto,
    kept: tuple[str, ...],
    bodies: dict[tuple[str, str, str], FunctionProto],
) -> None:
    """Name each inlined node after its call, so that layer names of an engine say which block they belong to.

    The inliner puts a function's nodes, in order, where the call was.
    """
    taken = {node.name for node in model.graph.node}
    position = 0
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type in kept:
            position += 1
            continue
        body = bodies[(node.domain, node.op_type, node.overload)]
        for inlined, original in zip(lowered.graph.node[position:], body.node, strict=False):
            inlined.name = _unique(f"{node.name or node.op_type}/{original.output[0]}", taken)
        position += len(body.node)


def _unique(name: str, taken: set[str]) -> str:
    """A name that no node has yet; onnxruntime refuses files in which two nodes have one."""
    result, count = name, 1
    while result in taken:
        count += 1
        result = f"{name}_{count}"
    taken.add(result)
    return result
