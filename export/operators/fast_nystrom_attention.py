"""FastNystromAttention: `fna.attention.nystrom_attention_reference` in ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fna.chebyshev import (
    CHEBYSHEV,
    CHEBYSHEV_COLUMN_FLOOR,
    CORES,
    NEWTON_SCHULZ,
    ChebyshevSteps,
    chebyshev_coefficients,
    chebyshev_from,
)
from fna.export.operators.builder import Builder
from fna.export.operators.onnx_attention import attention
from fna.export.operators.record import (
    CORE_DOMAIN_VERSION,
    MASKED_DOMAIN_VERSION,
    FormalAttribute,
    FormalParameter,
    Operator,
)
from fna.plan import ITERATIONS_OF_VERSION_1
from fna.special_tokens import MASKED_SCORE

_CORE_SCALE = 4 ** (-1 / 3)
_LOW, _MIDDLE, _HIGH = 7 / (4 * _CORE_SCALE**2), 15 / (4 * _CORE_SCALE), 13 / 4
"""An iteration's polynomial in W = U / s is `13/4 I - U (15/4s I - U (7/4s^2 I - U/4s^3))`, so with 4 s^3 = 1 the innermost
factor is 1 and costs nothing."""
_SWAP_LAST = (0, 1, 3, 2)


class _Drops(NamedTuple):
    """What masking takes off the scores of A, Bv and the output."""

    core: str
    exact: str
    output: str


def _body(
    op: Builder,
    query: str,  # [B, H, N, D] T
    key: str,  # [B, H, N, D] T
    value: str,  # [B, H, N, D] T
    landmarks: str,  # [B, S] or [1, S] int32
    landmark_bias: str,  # [B, S] or [1, S] fp32
    key_mask: str | None,  # [B, N] or [1, N] int32
    *,
    iterations: int,
    exact_rows: int,
    sink: int = 0,
    core: str = NEWTON_SCHULZ,
    steps: int = 0,
    low: float = 0.0,
) -> str:  # [B, H, N, D] T
    """Write FNA: everything inside is fp32, and the scale goes to the S landmark rows, never to the N tokens."""
    query_float, key_float, value_float = (op.as_float(tensor) for tensor in (query, key, value))
    scale = op.attribute("scale")
    size, count = op.Shape(query), op.Gather(op.Shape(landmarks), [1])
    rows_shape = op.Concat(op.Gather(size, [0, 1]), count, op.Gather(size, [3]), axis=0)
    column = op.Unsqueeze(landmarks, axes=[1, 3])  # [B, 1, S, 1]
    rows = op.Expand(column, rows_shape)  # [B, H, S, D] indices into axis 2
    query_landmarks = op.GatherElements(query_float, rows, axis=2, name="query_landmarks")
    key_landmarks = op.GatherElements(key_float, rows, axis=2, name="key_landmarks")
    key_columns = op.Transpose(op.Mul(key_landmarks, scale), perm=_SWAP_LAST)
    bias = op.Unsqueeze(landmark_bias, axes=[1, 2])
    drops = None if key_mask is None else _drops(op, size, count, landmarks, key_mask, bool(sink))

    def drop(scores: str, masked: str | None) -> str:
        return scores if masked is None else str(op.Sub(scores, masked))

    core_scores = op.Add(op.MatMul(query_landmarks, key_columns, name="core_scores"), bias)
    matrix = op.Softmax(drop(core_scores, drops and drops.core), axis=-1, name="core")  # A
    key_columns_of_all = op.Transpose(key_float, perm=_SWAP_LAST)  # [B, H, D, N]
    exact_scores = op.MatMul(op.Mul(query_landmarks, scale), key_columns_of_all, name="exact_scores")
    exact_weights = op.Softmax(drop(exact_scores, drops and drops.exact), axis=-1, name="exact_weights")
    exact = op.MatMul(exact_weights, value_float, name="exact")  # Bv
    if core == CHEBYSHEV:
        value_landmarks = op.GatherElements(value_float, rows, axis=2, name="value_landmarks")
        projected = _chebyshev(op, matrix, exact, value_landmarks, ChebyshevSteps(steps, low))
    else:
        projected = _newton_schulz(op, matrix, exact, count, iterations)
    scores = op.Add(op.MatMul(query_float, key_columns, name="scores"), bias)
    weights = op.Softmax(drop(scores, drops and drops.output), axis=-1, name="weights")
    out = op.MatMul(weights, projected, name="mixed")
    if exact_rows:
        out = op.ScatterND(out, _places(op, size, count, column), exact, name="with_exact_rows")
    return op.as_type_of(out, query)


def _fused_body(
    op: Builder,
    query: str,
    key: str,
    value: str,
    landmarks: str,
    landmark_bias: str,
    key_mask: str | None,
    *,
    iterations: int,
    exact_rows: int,
    sink: int = 0,
    core: str = NEWTON_SCHULZ,
    steps: int = 0,
    low: float = 0.0,
) -> str:
    """Write FNA with two ONNX Attentions in the type of its inputs; between them, over S rows, all is fp32. Shapes as in `_body`."""
    size, count = op.Shape(query), op.Gather(op.Shape(landmarks), [1])
    rows_shape = op.Concat(op.Gather(size, [0, 1]), count, op.Gather(size, [3]), axis=0)
    column = op.Unsqueeze(landmarks, axes=[1, 3])  # [B, 1, S, 1]
    rows = op.Expand(column, rows_shape)  # [B, H, S, D] indices into axis 2
    query_landmarks = op.GatherElements(query, rows, axis=2, name="query_landmarks")
    key_landmarks = op.GatherElements(key, rows, axis=2, name="key_landmarks")
    core_bias = output_bias = op.Unsqueeze(landmark_bias, axes=[1, 2])
    exact_bias = None
    if key_mask is not None:
        drops = _drops(op, size, count, landmarks, key_mask, bool(sink))
        core_bias, output_bias = op.Sub(core_bias, drops.core), op.Sub(output_bias, drops.output)
        exact_bias = op.as_type_of(op.Neg(drops.exact), query)
    scale = op.reference("scale")
    exact = attention(op, query_landmarks, key, value, exact_bias, scale=scale, name="exact")  # Bv
    key_columns = op.Transpose(op.Mul(op.as_float(key_landmarks), op.attribute("scale")), perm=_SWAP_LAST)
    core_scores = op.MatMul(op.as_float(query_landmarks), key_columns, name="core_scores")
    matrix = op.Softmax(op.Add(core_scores, core_bias), axis=-1, name="core")  # A
    if core == CHEBYSHEV:
        value_landmarks = op.as_float(op.GatherElements(value, rows, axis=2, name="value_landmarks"))
        projected = _chebyshev(op, matrix, op.as_float(exact), value_landmarks, ChebyshevSteps(steps, low))
    else:
        projected = _newton_schulz(op, matrix, op.as_float(exact), count, iterations)
    projected = op.as_type_of(projected, query)
    output_bias = op.as_type_of(output_bias, query)
    out = attention(op, query, key_landmarks, projected, output_bias, scale=scale, name="mixed")
    if exact_rows:
        out = str(op.ScatterND(out, _places(op, size, count, column), exact, name="with_exact_rows"))
    return out


def _newton_schulz(op: Builder, core: str, exact: str, count: str, iterations: int) -> str:
    """Write `Z @ exact`.

    An iteration is written over `U = (s A) Z` (see `_CORE_SCALE`), three elementwise operators beside its four products; the last is
    applied to Bv.
    """
    largest_sum = op.ReduceMax(op.ReduceSum(core, axes=[-2], keepdims=1), axes=[-1], keepdims=1)
    inverse = op.Div(op.Transpose(core, perm=_SWAP_LAST), largest_sum, name="inverse_0")
    scaled = op.Mul(core, _CORE_SCALE)
    steps = op.Range(0, op.Squeeze(count, axes=[0]), 1)
    identity = op.Cast(op.Equal(op.Unsqueeze(steps, axes=[0]), op.Unsqueeze(steps, axes=[1])), to="FLOAT")
    low, middle, high = (op.Mul(identity, factor) for factor in (_LOW, _MIDDLE, _HIGH))
    for step in range(1, iterations):
        product = op.MatMul(scaled, inverse, name=f"product_{step}")
        inner = op.Sub(middle, op.MatMul(product, op.Sub(low, product)))
        inverse = op.MatMul(inverse, op.Sub(high, op.MatMul(product, inner)), name=f"inverse_{step}")
    product = op.MatMul(scaled, inverse, name=f"product_{iterations}")
    vector = exact
    for factor in (_LOW, _MIDDLE, _HIGH):
        vector = op.Sub(op.Mul(exact, factor), op.MatMul(product, vector))
    return str(op.MatMul(inverse, vector, name="projected"))


def _chebyshev(op: Builder, core: str, exact: str, value_landmarks: str, chebyshev: ChebyshevSteps) -> str:
    """Write `fna.attention.chebyshev_core`; w goes to A's columns, which are the rows of its transpose."""
    floored = op.Max(op.ReduceSum(core, axes=[-2], keepdims=1), CHEBYSHEV_COLUMN_FLOOR)
    weighted = op.Transpose(op.Div(core, floored), perm=_SWAP_LAST)  # w A^T
    normal = op.MatMul(weighted, core, name="normal")  # T
    residual = op.Sub(exact, op.MatMul(core, value_landmarks))
    mean = op.ReduceMean(residual, axes=[-2], keepdims=1)
    residual = op.MatMul(weighted, op.Sub(residual, mean), name="residual")
    (alpha, _), *rest = chebyshev_coefficients(chebyshev.steps, chebyshev.low)
    total = step = op.Mul(residual, alpha)
    for alpha, beta in rest:
        residual = op.Sub(residual, op.MatMul(normal, step))
        step = op.Add(op.Mul(step, beta), op.Mul(residual, alpha))
        total = op.Add(total, step)
    return str(op.Add(op.Add(value_landmarks, mean), total, name="projected"))


def _drops(op: Builder, size: str, count: str, landmarks: str, key_mask: str, sink: bool) -> _Drops:
    """Write what masking takes off; see `fna.special_tokens.masked_scores`."""
    batch = op.Gather(size, [0])
    flags = op.Cast(op.Cast(key_mask, to="BOOL"), to="FLOAT")
    whole = op.Expand(flags, op.Concat(batch, op.Gather(size, [2]), axis=0))  # [B, N]
    short = op.GatherElements(whole, op.Expand(landmarks, op.Concat(batch, count, axis=0)), axis=1)  # [B, S]
    whole_row, short_row = (op.Unsqueeze(op.Mul(mask, MASKED_SCORE), axes=[1, 2]) for mask in (whole, short))
    if not sink:
        return _Drops(short_row, whole_row, short_row)
    # Masked tokens, as queries, keep all their keys.
    whole_column, short_column = (op.Unsqueeze(op.Sub(1.0, mask), axes=[1, 3]) for mask in (whole, short))
    return _Drops(op.Mul(short_row, short_column), op.Mul(whole_row, short_column), op.Mul(short_row, whole_column))


def _places(op: Builder, size: str, count: str, column: str) -> str:
    """Write where Bv goes, a whole row at a time: indices (item, head, token), `[B, H, S, 3]`."""
    shape = op.Concat(op.Gather(size, [0, 1]), count, [1], axis=0)
    items, heads = (op.Range(0, op.Gather(size, axis), 1) for axis in (0, 1))
    indices = (
        op.Unsqueeze(items, axes=[1, 2, 3]),
        op.Unsqueeze(heads, axes=[0, 2, 3]),
        op.Cast(column, to="INT64"),
    )
    return str(op.Concat(*(op.Expand(index, shape) for index in indices), axis=3))


def core_of(attributes: Mapping[str, Any]) -> ChebyshevSteps | None:
    """Return the cheaper core of a node with these attributes, None for Newton-Schulz."""
    if attributes.get("core", NEWTON_SCHULZ) != CHEBYSHEV:
        return None
    return ChebyshevSteps(int(attributes["steps"]), _LOW_ATTRIBUTE.plain(attributes["low"]))


def core_attributes(iterations: int, chebyshev: ChebyshevSteps | None) -> dict[str, Any]:
    """Return the attributes that say a node's core; `iterations` is said of Newton-Schulz alone."""
    if chebyshev is None:
        return {"iterations": iterations}
    return {"core": CHEBYSHEV, "steps": chebyshev.steps, "low": chebyshev.low}


def _from_torch(  # type: ignore[no-untyped-def]
    write, query, key, value, landmarks, landmark_bias, scale, iterations, exact_rows, steps=0, low=0.0
) -> Any:
    bias = _zero_bias(landmarks) if landmark_bias is None else landmark_bias
    core = core_attributes(iterations, chebyshev_from(steps, low))
    return write(query, key, value, landmarks, bias, scale=scale, **core, exact_rows=exact_rows)


def _masked_from_torch(  # type: ignore[no-untyped-def]
    write, query, key, value, landmarks, landmark_bias, key_mask, scale, iterations, exact_rows, sink, steps=0, low=0.0
) -> Any:
    bias = _zero_bias(landmarks) if landmark_bias is None else landmark_bias
    core = core_attributes(iterations, chebyshev_from(steps, low))
    return write(
        query, key, value, landmarks, bias, key_mask, scale=scale, **core, exact_rows=exact_rows, sink=sink
    )  # fmt: skip


def _zero_bias(landmarks: Any) -> Any:
    from onnx import numpy_helper
    from onnxscript import opset18

    return opset18.Constant(value=numpy_helper.from_array(np.zeros((1, int(landmarks.shape[1])), np.float32)))


_LOW_ATTRIBUTE = FormalAttribute("low", "FLOAT", 0.0, since=CORE_DOMAIN_VERSION, written=True)

FAST_NYSTROM_ATTENTION = Operator(
    "FastNystromAttention",
    inputs=(
        FormalParameter("query"),
        FormalParameter("key"),
        FormalParameter("value"),
        FormalParameter("landmarks", "INT32"),
        FormalParameter("landmark_bias", "FLOAT"),
        FormalParameter("key_mask", "INT32", since=MASKED_DOMAIN_VERSION),
    ),
    outputs=(FormalParameter("out"),),
    attributes=(
        FormalAttribute("scale", "FLOAT"),
        FormalAttribute("iterations", default=ITERATIONS_OF_VERSION_1),
        FormalAttribute("exact_rows", default=0),
        FormalAttribute("sink", default=0, since=MASKED_DOMAIN_VERSION),
        FormalAttribute("core", "STRING", NEWTON_SCHULZ, since=CORE_DOMAIN_VERSION, alone=True, choices=CORES),
        FormalAttribute("steps", default=0, since=CORE_DOMAIN_VERSION),
        _LOW_ATTRIBUTE,
    ),
    body=_body,
    fused_body=_fused_body,
    torch_operators={"attention": _from_torch, "attention_with_key_mask": _masked_from_torch},
    plugin=True,
    attends=True,
    approximates=True,
    typed=True,
)
