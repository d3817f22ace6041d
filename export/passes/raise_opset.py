"""A file at a later version of the standard operators, every node's meaning kept."""

from __future__ import annotations

import onnx
from onnx import ModelProto

from fna.errors import InvalidArgumentError
from fna.export.operators.registry import model_opset
from fna.quiet import quiet_loggers


def raise_opset(model: ModelProto, opset: int) -> ModelProto:
    """Return a copy of a file without functions at a later opset; nodes of other domains, weights' references and metadata are kept.

    Raises:
        InvalidArgumentError: if the file holds a node that the converter cannot bring there.
    """
    import onnx_ir
    from onnxscript.version_converter import convert_version

    before = model_opset(model)
    copy = onnx_ir.from_proto(model)
    try:
        with quiet_loggers("onnxscript.version_converter"):  # which of its two converters it takes
            convert_version(copy, opset, fallback=True)
        raised = onnx_ir.to_proto(copy)
    except Exception as error:  # of many kinds: the converters are two, one of them in C++
        raise InvalidArgumentError(_refusal(before, opset, str(error))) from error
    if model_opset(raised) != opset:
        raise InvalidArgumentError(_refusal(before, opset, "the converter left it as it was"))
    _keep_interface(model, raised)
    return raised


def _keep_interface(model: ModelProto, raised: ModelProto) -> None:
    for side in ("input", "output"):
        before, after = getattr(model.graph, side), getattr(raised.graph, side)
        if [value.name for value in before] != [value.name for value in after]:
            raise InvalidArgumentError(f"the converter changed the file's {side}s; choose the lowering portable")
    if {pair.key for pair in model.metadata_props} != {pair.key for pair in raised.metadata_props}:
        del raised.metadata_props[:]
        raised.metadata_props.extend(model.metadata_props)
    raised.ir_version = max(raised.ir_version, onnx.helper.find_min_ir_version_for(list(raised.opset_import), True))


def _refusal(before: int, opset: int, reason: str) -> str:
    return (
        f"the file's operators of opset {before} cannot be raised to opset {opset}, which the fused lowering needs "
        f"({' '.join(reason.split())[:300]}); choose the lowering portable"
    )
