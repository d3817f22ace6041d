"""The signatures of this project's ONNX operators, for tools that need a schema (DESIGN's table of operators)."""

from __future__ import annotations

from onnx.defs import OpSchema

from fna.export.functions import ATTENTION, DOMAIN, DOMAIN_VERSION, FARTHEST_POINTS, NORM_GRID, PLUGIN_FIELDS

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def operator_schema(op_type: str) -> OpSchema:
    """Return the schema of one operator of domain `fna`.

    Raises:
        KeyError: for an operator that is not one of ours.
    """
    parameter = OpSchema.FormalParameter
    if op_type == ATTENTION:
        inputs = [parameter(name, "T") for name in ("query", "key", "value")]
        inputs += [parameter("landmarks", "tensor(int32)"), parameter("landmark_bias", "tensor(float)")]
        outputs = [parameter("out", "T")]
    else:
        inputs = [parameter("features", "T")]
        outputs = [parameter("landmarks", "tensor(int32)")]
    attributes = {
        ATTENTION: [("scale", "FLOAT"), ("iterations", "INT"), ("exact_rows", "INT")],
        FARTHEST_POINTS: [("num_landmarks", "INT")],
        NORM_GRID: [("num_landmarks", "INT"), ("prefix_tokens", "INT")],
    }[op_type]
    if op_type != NORM_GRID:
        attributes = attributes + [(name, "STRING") for name in PLUGIN_FIELDS]
    return OpSchema(
        op_type,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[("T", _FLOATS, "type of the floating-point tensors")],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType[kind], "", required=False) for name, kind in attributes],
    )
