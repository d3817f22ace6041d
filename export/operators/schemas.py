"""The signatures of this project's ONNX operators, for tools that need a schema (DESIGN's table of operators)."""

from __future__ import annotations

from onnx.defs import OpSchema

from fna.export.operators.functions import (
    ARTIFACT_TOKENS,
    ATTENTION,
    DOMAIN,
    DOMAIN_VERSION,
    FARTHEST_POINTS,
    GUIDED_FEATURES,
    GUIDED_GRID,
    GUIDED_PICKS,
    LANDMARK_ROLES,
    LARGEST_NORM_ROLES,
    MASKED_ATTENTION,
    MASKED_DOMAIN_VERSION,
    MASSIVE_TOKENS,
    NORM_GRID,
    PLUGIN_FIELDS,
    PLUGIN_OPS,
)

_ROLE_OPERATORS = {
    LANDMARK_ROLES: (["include", "exclude"], ["role"]),
    LARGEST_NORM_ROLES: (["features", "role"], ["roles"]),
    GUIDED_GRID: (["role"], ["landmarks", "landmark_bias"]),
    GUIDED_FEATURES: (["features", "role"], ["guided"]),
    GUIDED_PICKS: (["role", "picks"], ["landmarks"]),
}
_ROLE_TYPES = {"features": "T", "guided": "T", "landmark_bias": "tensor(float)"}
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def operator_schema(op_type: str, *, key_mask: bool = False) -> OpSchema:
    """Return the schema of one operator of domain `fna`; `key_mask`: FastNystromAttention as of version 2.

    Raises:
        KeyError: for an operator that is not one of ours.
    """
    parameter = OpSchema.FormalParameter
    if op_type == ATTENTION:
        inputs = [parameter(name, "T") for name in ("query", "key", "value")]
        inputs += [parameter("landmarks", "tensor(int32)"), parameter("landmark_bias", "tensor(float)")]
        if key_mask:
            inputs.append(parameter("key_mask", "tensor(int32)", param_option=OpSchema.FormalParameterOption.Optional))
        outputs = [parameter("out", "T")]
    elif op_type == MASKED_ATTENTION:
        inputs = [*(parameter(name, "T") for name in ("query", "key", "value")), parameter("key_mask", "tensor(int32)")]
        outputs = [parameter("out", "T")]
    elif op_type in (MASSIVE_TOKENS, ARTIFACT_TOKENS):
        inputs = [parameter(name, "T") for name in (["hidden"] if op_type == MASSIVE_TOKENS else ["query", "key"])]
        outputs = [parameter("key_mask", "tensor(int32)")]
    elif op_type in _ROLE_OPERATORS:
        names, results = _ROLE_OPERATORS[op_type]
        inputs = [parameter(name, _ROLE_TYPES.get(name, "tensor(int32)")) for name in names]
        outputs = [parameter(name, _ROLE_TYPES.get(name, "tensor(int32)")) for name in results]
    else:
        inputs = [parameter("features", "T")]
        outputs = [parameter("landmarks", "tensor(int32)")]
    attributes = {
        ATTENTION: [("scale", "FLOAT"), ("iterations", "INT"), ("exact_rows", "INT"), *([("sink", "INT")] * key_mask)],
        MASKED_ATTENTION: [("scale", "FLOAT"), ("sink", "INT")],
        MASSIVE_TOKENS: [("prefix_tokens", "INT")],
        ARTIFACT_TOKENS: [("scale", "FLOAT"), ("prefix_tokens", "INT")],
        FARTHEST_POINTS: [("num_landmarks", "INT")],
        NORM_GRID: [("num_landmarks", "INT"), ("prefix_tokens", "INT")],
        LANDMARK_ROLES: [("num_landmarks", "INT"), ("prefix_tokens", "INT")],
        LARGEST_NORM_ROLES: [("num_landmarks", "INT"), ("prefix_tokens", "INT")],
        GUIDED_GRID: [("num_landmarks", "INT"), ("prefix_tokens", "INT"), ("middles", "INT")],
        GUIDED_FEATURES: [],
        GUIDED_PICKS: [("num_landmarks", "INT")],
    }[op_type]
    if op_type in PLUGIN_OPS:
        attributes = attributes + [(name, "STRING") for name in PLUGIN_FIELDS]
    return OpSchema(
        op_type,
        DOMAIN,
        MASKED_DOMAIN_VERSION if key_mask else DOMAIN_VERSION,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[("T", _FLOATS, "type of the floating-point tensors")]
        if any(item.type_str == "T" for item in inputs)
        else [],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType[kind], "", required=False) for name, kind in attributes],
    )
