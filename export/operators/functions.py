"""The ONNX bodies of this project's operators: model-local functions of domain `fna`, in standard operators only.

A file that carries these functions runs on any ONNX runtime as it is; a TensorRT plugin of the operator's name can take the
function's place (`fna.export.passes.lower`). Bodies exist for opsets 14 to 24. Softmax, sums and Newton-Schulz are fp32 whatever the
type of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
import onnx.parser
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from fna.errors import InvalidArgumentError
from fna.export.operators.builder import check_opset
from fna.samplers.common.roles import include_room, most_guaranteed, norm_grid_count
from fna.special_tokens import LARGEST_SHARE, MASKED_SCORE, MINIMAL_GAP

DOMAIN = "fna"
DOMAIN_VERSION = 1
MASKED_DOMAIN_VERSION = 2
"""From here on FastNystromAttention has an optional sixth input, `key_mask`; files that do not use it stay at version 1."""

ATTENTION = "FastNystromAttention"
FARTHEST_POINTS = "FarthestPointSampling"
NORM_GRID = "NormGridLandmarks"
MASKED_ATTENTION = "MaskedAttention"
MASSIVE_TOKENS = "MassiveTokens"
ARTIFACT_TOKENS = "ArtifactTokens"
LANDMARK_ROLES = "LandmarkRoles"
LARGEST_NORM_ROLES = "LargestNormRoles"
GUIDED_GRID = "GuidedGrid"
GUIDED_FEATURES = "GuidedFeatures"
GUIDED_PICKS = "GuidedPicks"
PLUGIN_OPS = (ATTENTION, FARTHEST_POINTS)
"""Operators that a TensorRT plugin implements; the other operators of the domain are always inlined."""

PLUGIN_FIELDS: dict[str, str] = {"plugin_version": "1", "plugin_namespace": ""}
MASKED_PLUGIN_FIELDS: dict[str, str] = {**PLUGIN_FIELDS, "plugin_version": "2"}
OVERLOAD_IR_VERSION = 10

_LARGEST = 3.0e38
"""Stands for an infinite distance; finite, because some builders fold infinities away."""


@dataclass(frozen=True)
class FunctionVariant:
    """What the body of one operator depends on, besides the opset."""

    op_type: str
    element_type: int = TensorProto.UNDEFINED
    iterations: int = 6
    exact_rows: bool = False
    num_landmarks: int = 0
    prefix_tokens: int = 0
    masked: bool = False
    sink: bool = False
    middles: bool = False

    @property
    def overload(self) -> str:
        """The name that tells this variant from others of the same operator in one file."""
        mask = "" if not self.masked else "_sink" if self.sink else "_masked"
        if self.op_type == ATTENTION:
            rows = "exact_rows" if self.exact_rows else "published"
            return f"{_type_name(self.element_type)}_{rows}_i{self.iterations}{mask}"
        if self.op_type == MASKED_ATTENTION:
            return f"{_type_name(self.element_type)}{mask}"
        middles = "_middles" if self.middles else ""
        return f"{_type_name(self.element_type)}_s{self.num_landmarks}_p{self.prefix_tokens}{middles}"


def attach_functions(
    model: ModelProto,
    element_type: int = TensorProto.UNDEFINED,
    element_types: dict[str, int] | None = None,
) -> None:
    """Add to `model`, in place, the functions that its `fna` nodes call, in the model's own opset.

    Where nodes of one operator need different bodies (other iterations, types or sizes), the functions are told apart by
    the `overload` field, which needs IR version 10.

    Args:
        model: holds nodes of domain `fna` in its graph.
        element_type: the ONNX type of the nodes' floating-point inputs; undefined writes bodies that take any type.
        element_types: the same for single nodes, by node name, where they differ.

    Raises:
        InvalidArgumentError: for an opset outside 14 to 24, or an operator that is not one of ours.
    """
    opset = model_opset(model)
    nodes = list(fna_nodes(model.graph))
    types = element_types or {}
    variants = {id(node): _variant_of(node, types.get(node.name, element_type)) for node in nodes}
    distinct: dict[str, set[FunctionVariant]] = {}
    for variant in variants.values():
        distinct.setdefault(variant.op_type, set()).add(variant)
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    for op_type in sorted(distinct):
        several = len(distinct[op_type]) > 1
        for variant in sorted(distinct[op_type], key=lambda item: item.overload):
            model.functions.append(make_function(variant, opset, overload=variant.overload if several else ""))
        if several:
            model.ir_version = max(model.ir_version, OVERLOAD_IR_VERSION)
        for node in nodes:
            if node.op_type == op_type:
                node.overload = variants[id(node)].overload if several else ""
    version = MASKED_DOMAIN_VERSION if any(variant.masked for variant in variants.values()) else DOMAIN_VERSION
    imported = [entry for entry in model.opset_import if entry.domain == DOMAIN]
    for entry in imported:
        entry.version = max(entry.version, version)
    if nodes and not imported:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, version))


def make_function(variant: FunctionVariant, opset: int, *, overload: str = "") -> FunctionProto:
    """Return the body of one operator for one opset.

    Raises:
        InvalidArgumentError: for an opset outside 14 to 24; for opset 14 without an element type (it has no CastLike).
    """
    check_opset(opset)
    if (
        opset < 15
        and variant.op_type in (ATTENTION, MASKED_ATTENTION)
        and variant.element_type == TensorProto.UNDEFINED
    ):
        raise InvalidArgumentError("opset 14 has no CastLike: the element type of the FNA inputs must be given")
    texts = {
        ATTENTION: _attention_text,
        FARTHEST_POINTS: _farthest_points_text,
        NORM_GRID: _norm_grid_text,
        MASKED_ATTENTION: _masked_attention_text,
        MASSIVE_TOKENS: _massive_tokens_text,
        ARTIFACT_TOKENS: _artifact_tokens_text,
        LANDMARK_ROLES: _landmark_roles_text,
        LARGEST_NORM_ROLES: _largest_norm_roles_text,
        GUIDED_GRID: _guided_grid_text,
        GUIDED_FEATURES: _guided_features_text,
        GUIDED_PICKS: _guided_picks_text,
    }
    text = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">\n' + texts[variant.op_type](variant, opset)
    function = onnx.parser.parse_function(text)
    function.overload = overload
    for name, value in _attribute_defaults(variant):
        function.attribute_proto.append(onnx.helper.make_attribute(name, value))
    return function


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
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    raise InvalidArgumentError("the model imports no standard operator set; add one to its opset_import")


def node_attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values, strings decoded."""
    values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def has_key_mask(node: NodeProto) -> bool:
    """Whether a FastNystromAttention node has its optional sixth input."""
    return len(node.input) > 5 and bool(node.input[5])


def _variant_of(node: NodeProto, element_type: int) -> FunctionVariant:
    given = node_attributes(node)
    if node.op_type == ATTENTION:
        return FunctionVariant(
            ATTENTION,
            element_type,
            int(given.get("iterations", 6)),
            bool(given.get("exact_rows", 0)),
            masked=has_key_mask(node),
            sink=bool(given.get("sink", 0)),
        )
    if node.op_type == MASKED_ATTENTION:
        return FunctionVariant(MASKED_ATTENTION, element_type, masked=True, sink=bool(given.get("sink", 0)))
    if node.op_type in (MASSIVE_TOKENS, ARTIFACT_TOKENS):
        return FunctionVariant(node.op_type, prefix_tokens=int(given["prefix_tokens"]))
    if node.op_type == FARTHEST_POINTS:
        return FunctionVariant(FARTHEST_POINTS, num_landmarks=int(given["num_landmarks"]))
    if node.op_type in (NORM_GRID, LANDMARK_ROLES, LARGEST_NORM_ROLES, GUIDED_GRID):
        return FunctionVariant(
            node.op_type,
            num_landmarks=int(given["num_landmarks"]),
            prefix_tokens=int(given["prefix_tokens"]),
            middles=bool(given.get("middles", 0)),
        )
    if node.op_type == GUIDED_FEATURES:
        return FunctionVariant(GUIDED_FEATURES)
    if node.op_type == GUIDED_PICKS:
        return FunctionVariant(GUIDED_PICKS, num_landmarks=int(given["num_landmarks"]))
    raise InvalidArgumentError(
        f"node {node.name!r} is fna::{node.op_type}, which is not one of this project's operators"
    )


def _attribute_defaults(variant: FunctionVariant) -> Iterable[tuple[str, Any]]:
    if variant.op_type == ATTENTION:
        yield "iterations", variant.iterations
        yield "exact_rows", int(variant.exact_rows)
    if variant.masked:
        yield "sink", int(variant.sink)
    sized = (NORM_GRID, LANDMARK_ROLES, LARGEST_NORM_ROLES, GUIDED_GRID)
    if variant.op_type in (FARTHEST_POINTS, GUIDED_PICKS, *sized):
        yield "num_landmarks", variant.num_landmarks
    if variant.op_type in (MASSIVE_TOKENS, ARTIFACT_TOKENS, *sized):
        yield "prefix_tokens", variant.prefix_tokens
    if variant.op_type == GUIDED_GRID:
        yield "middles", int(variant.middles)
    if variant.op_type in PLUGIN_OPS:
        yield from (MASKED_PLUGIN_FIELDS if variant.masked else PLUGIN_FIELDS).items()


_CORE_SCALE = 4 ** (-1 / 3)
_COEFFICIENTS = {"low": 7 / (4 * _CORE_SCALE**2), "middle": 15 / (4 * _CORE_SCALE), "high": 13 / 4}
"""An iteration's polynomial in W = U / s is `13/4 I - U (15/4s I - U (7/4s^2 I - U/4s^3))`, so with 4 s^3 = 1 the innermost
factor is 1 and costs nothing."""


def _attention_text(variant: FunctionVariant, opset: int) -> str:
    """Write FNA as ONNX text.

    The scale goes to the S landmark rows, never to the N tokens. An iteration is written over
    `U = (s A) Z` (see `_CORE_SCALE`), three elementwise operators beside its four products; the last is applied to Bv.
    """
    typed = variant.element_type == TensorProto.FLOAT
    query, key, value = ("query", "key", "value") if typed else ("query_f", "key_f", "value_f")
    result = "out" if typed else "result"
    last_product = "mixed" if variant.exact_rows else result
    lines = [
        f"{ATTENTION} <scale> (query, key, value, landmarks, landmark_bias{', key_mask' * variant.masked}) => (out) {{",
        *([] if typed else [f"{name}_f = Cast <to = 1> ({name})" for name in ("query", "key", "value")]),
        "scale = Constant <value_float: float = @scale> ()",
        "rows_axes = Constant <value_ints = [1, 3]> ()",
        "bias_axes = Constant <value_ints = [1, 2]> ()",
        "column_axis = Constant <value_ints = [-2]> ()",
        *(["row_axis = Constant <value_ints = [-1]> ()"] if opset >= 18 else []),
        # [B, H, S, D] indices into axis 2
        "dims = Shape (query)",
        "landmark_dims = Shape (landmarks)",
        "leading = Constant <value_ints = [0, 1]> ()",
        "second = Constant <value_ints = [1]> ()",
        "last = Constant <value_ints = [3]> ()",
        "batch_heads = Gather <axis = 0> (dims, leading)",
        "count = Gather <axis = 0> (landmark_dims, second)",
        "head_size = Gather <axis = 0> (dims, last)",
        "rows_shape = Concat <axis = 0> (batch_heads, count, head_size)",
        "rows_narrow = Unsqueeze (landmarks, rows_axes)",
        "rows = Expand (rows_narrow, rows_shape)",
        f"query_landmarks = GatherElements <axis = 2> ({query}, rows)",
        f"key_gathered = GatherElements <axis = 2> ({key}, rows)",
        "query_scaled = Mul (query_landmarks, scale)",
        "key_scaled = Mul (key_gathered, scale)",
        "key_columns = Transpose <perm = [0, 1, 3, 2]> (key_scaled)",
        "bias = Unsqueeze (landmark_bias, bias_axes)",
        # A
        "core_plain = MatMul (query_landmarks, key_columns)",
        *(_mask_lines(variant.sink) if variant.masked else []),
        *_add_bias_lines("core_scores", "core_plain", "core_drop" if variant.masked else None),
        "core = Softmax <axis = -1> (core_scores)",
        # Bv
        "query_columns = Transpose <perm = [0, 1, 3, 2]> (query_scaled)",
        f"exact_columns = MatMul ({key}, query_columns)",
        *(
            [
                "exact_plain = Transpose <perm = [0, 1, 3, 2]> (exact_columns)",
                "exact_scores = Sub (exact_plain, exact_drop)",
            ]
            if variant.masked
            else ["exact_scores = Transpose <perm = [0, 1, 3, 2]> (exact_columns)"]
        ),
        "exact_weights = Softmax <axis = -1> (exact_scores)",
        f"exact_rows_out = MatMul (exact_weights, {value})",
        # Z0
        "core_transposed = Transpose <perm = [0, 1, 3, 2]> (core)",
        "column_sums = ReduceSum <keepdims = 1> (core, column_axis)",
        "largest_sum = " + _reduce("ReduceMax", "column_sums", -1, "row_axis", opset),
        "inverse_0 = Div (core_transposed, largest_sum)",
        f"core_scale = Constant <value_float = {_CORE_SCALE!r}> ()",
        "core_scaled = Mul (core, core_scale)",
        *_identity_lines(),
        *(line for step in range(variant.iterations - 1) for line in _newton_schulz_lines(step)),
        *_last_iteration_lines(variant.iterations - 1),
        # output
        f"scores_plain = MatMul ({query}, key_columns)",
        *_add_bias_lines("scores", "scores_plain", "scores_drop" if variant.masked else None),
        "weights = Softmax <axis = -1> (scores)",
        f"{last_product} = MatMul (weights, projected)",
    ]
    if variant.exact_rows:
        lines += _exact_rows_lines(result)
    if variant.element_type == TensorProto.UNDEFINED:
        lines.append(f"out = CastLike ({result}, query)")
    elif not typed:
        lines.append(f"out = Cast <to = {variant.element_type}> ({result})")
    return "\n".join(lines) + "\n}"


def _add_bias_lines(result: str, plain: str, drop: str | None) -> list[str]:
    if drop is None:
        return [f"{result} = Add ({plain}, bias)"]
    return [f"{result}_biased = Add ({plain}, bias)", f"{result} = Sub ({result}_biased, {drop})"]


def _mask_lines(sink: bool) -> list[str]:
    """Write what masking takes off the scores of A, Bv and the output; see `fna.special_tokens.masked_scores`."""
    lines = [
        "mask_first = Constant <value_ints = [0]> ()",
        "mask_third = Constant <value_ints = [2]> ()",
        "mask_batch = Gather <axis = 0> (dims, mask_first)",
        "mask_tokens = Gather <axis = 0> (dims, mask_third)",
        "mask_shape = Concat <axis = 0> (mask_batch, mask_tokens)",
        "index_shape_2d = Concat <axis = 0> (mask_batch, count)",
        "mask_flags = Cast <to = 9> (key_mask)",
        "mask_float = Cast <to = 1> (mask_flags)",
        "mask_whole = Expand (mask_float, mask_shape)",
        "landmarks_whole = Expand (landmarks, index_shape_2d)",
        "mask_short = GatherElements <axis = 1> (mask_whole, landmarks_whole)",
        f"masked_score = Constant <value_float = {MASKED_SCORE}> ()",
        "drop_whole = Mul (mask_whole, masked_score)",
        "drop_short = Mul (mask_short, masked_score)",
    ]
    if not sink:
        return [
            *lines,
            "core_drop = Unsqueeze (drop_short, bias_axes)",
            "exact_drop = Unsqueeze (drop_whole, bias_axes)",
            "scores_drop = Identity (core_drop)",
        ]
    return [
        *lines,
        "drop_whole_row = Unsqueeze (drop_whole, bias_axes)",
        "drop_short_row = Unsqueeze (drop_short, bias_axes)",
        "mask_one = Constant <value_float = 1.0> ()",
        "ordinary_whole = Sub (mask_one, mask_whole)",
        "ordinary_short = Sub (mask_one, mask_short)",
        "ordinary_whole_column = Unsqueeze (ordinary_whole, rows_axes)",
        "ordinary_short_column = Unsqueeze (ordinary_short, rows_axes)",
        "core_drop = Mul (drop_short_row, ordinary_short_column)",
        "exact_drop = Mul (drop_whole_row, ordinary_short_column)",
        "scores_drop = Mul (drop_short_row, ordinary_whole_column)",
    ]


def _exact_rows_lines(result: str) -> list[str]:
    """Write Bv over the landmark rows, a whole row at a time, by `[B, H, S, 3]` indices (item, head, token)."""
    return [
        "items_axes = Constant <value_ints = [1, 2, 3]> ()",
        "heads_axes = Constant <value_ints = [0, 2, 3]> ()",
        "unit = Constant <value_ints = [1]> ()",
        "index_shape = Concat <axis = 0> (batch_heads, count, unit)",
        "batch_size = Gather <axis = 0> (dims, zero)",
        "head_count = Gather <axis = 0> (dims, one)",
        "items = Range (zero, batch_size, one)",
        "heads = Range (zero, head_count, one)",
        "items_4d = Unsqueeze (items, items_axes)",
        "heads_4d = Unsqueeze (heads, heads_axes)",
        "tokens_4d = Cast <to = 7> (rows_narrow)",
        "items_wide = Expand (items_4d, index_shape)",
        "heads_wide = Expand (heads_4d, index_shape)",
        "tokens_wide = Expand (tokens_4d, index_shape)",
        "places = Concat <axis = 3> (items_wide, heads_wide, tokens_wide)",
        f"{result} = ScatterND (mixed, places, exact_rows_out)",
    ]


def _identity_lines() -> list[str]:
    """Write the identity's multiples that an iteration needs; constants wherever S is known."""
    return [
        "zero = Constant <value_int = 0> ()",
        "one = Constant <value_int = 1> ()",
        "size = Gather <axis = 0> (landmark_dims, one)",
        "steps = Range (zero, size, one)",
        "first_axis = Constant <value_ints = [0]> ()",
        "steps_row = Unsqueeze (steps, first_axis)",
        "steps_column = Unsqueeze (steps, second)",
        "diagonal = Equal (steps_row, steps_column)",
        "identity = Cast <to = 1> (diagonal)",
        *(
            line
            for name, value in _COEFFICIENTS.items()
            for line in (
                f"{name}_value = Constant <value_float = {value}> ()",
                f"{name} = Mul (identity, {name}_value)",
            )
        ),
    ]


def _newton_schulz_lines(step: int) -> list[str]:
    return [
        f"w_{step} = MatMul (core_scaled, inverse_{step})",
        f"inner_{step} = Sub (low, w_{step})",
        f"inner_w_{step} = MatMul (w_{step}, inner_{step})",
        f"outer_{step} = Sub (middle, inner_w_{step})",
        f"outer_w_{step} = MatMul (w_{step}, outer_{step})",
        f"factor_{step} = Sub (high, outer_w_{step})",
        f"inverse_{step + 1} = MatMul (inverse_{step}, factor_{step})",
    ]


def _last_iteration_lines(step: int) -> list[str]:
    lines = [f"w_last = MatMul (core_scaled, inverse_{step})"]
    vector = "exact_rows_out"
    for name in _COEFFICIENTS:
        lines += [
            f"p_{name} = MatMul (w_last, {vector})",
            f"b_{name} = Mul (exact_rows_out, {name}_value)",
            f"s_{name} = Sub (b_{name}, p_{name})",
        ]
        vector = f"s_{name}"
    return [*lines, f"projected = MatMul (inverse_{step}, {vector})"]


def _farthest_points_text(variant: FunctionVariant, opset: int) -> str:
    square_sum = _reduce("ReduceSumSquare", "offset", 2, "channel_axis", opset, keepdims=0)
    return f"""{FARTHEST_POINTS} (features) => (landmarks) {{
        points = Cast <to = 1> (features)
        dims = Shape (features)
        zero_one = Constant <value_ints = [0, 1]> ()
        first = Constant <value_ints = [0]> ()
        last = Constant <value_ints = [2]> ()
        one = Constant <value_ints = [1]> ()
        channel_axis = Constant <value_ints = [2]> ()
        grid = Gather <axis = 0> (dims, zero_one)
        batch = Gather <axis = 0> (dims, first)
        channels = Gather <axis = 0> (dims, last)
        point_shape = Concat <axis = 0> (batch, one, channels)
        pair_shape = Concat <axis = 0> (batch, one)
        far = Constant <value_float = {_LARGEST}> ()
        start = Expand (far, grid)
        chosen_mark = Constant <value_float = -1.0> ()
        marks = Expand (chosen_mark, pair_shape)
        steps = Constant <value_int = {variant.num_landmarks}> ()
        keep_going = Cast <to = 9> (steps)
        last_distance, picks = Loop (steps, keep_going, start) <body = step
            (int64 number, bool go, float[batch_size, num_tokens] distance)
            => (bool go_on, float[batch_size, num_tokens] next_distance, int32[batch_size] pick) {{
                go_on = Identity (go)
                index = ArgMax <axis = 1, keepdims = 1, select_last_index = 0> (distance)
                index_narrow = Unsqueeze (index, channel_axis)
                index_wide = Expand (index_narrow, point_shape)
                point = GatherElements <axis = 1> (points, index_wide)
                offset = Sub (points, point)
                squared = {square_sum}
                nearer = Min (distance, squared)
                next_distance = ScatterElements <axis = 1> (nearer, index, marks)
                index_flat = Squeeze (index, one)
                pick = Cast <to = 6> (index_flat)
            }}>
        landmarks = Transpose <perm = [1, 0]> (picks)
    }}"""


def _norm_grid_text(variant: FunctionVariant, opset: int) -> str:
    prefix = min(variant.prefix_tokens, variant.num_landmarks)
    by_norm = norm_grid_count(variant.num_landmarks, prefix)
    spaced = variant.num_landmarks - prefix - by_norm
    square_sum = _reduce("ReduceSumSquare", "values", 2, "channel_axis", opset, keepdims=0)
    front = ", ".join(str(index) for index in range(prefix))
    odd = ", ".join(str(2 * slot + 1) for slot in range(spaced))
    ranks = ", ".join(f"{rank}.0" for rank in range(by_norm))
    parts = (["front"] if prefix else []) + (["taken_index"] if by_norm else []) + (["even_index"] if spaced else [])
    lines = [
        f"{NORM_GRID} (features) => (landmarks) {{",
        "values = Cast <to = 1> (features)",
        "channel_axis = Constant <value_ints = [2]> ()",
        "token_axis = Constant <value_ints = [1]> ()",
        f"squared_norms = {square_sum}",
        f"prefix = Constant <value_ints = [{prefix}]> ()",
        "far_end = Constant <value_ints = [9223372036854775807]> ()",
        "patch_norms = Slice (squared_norms, prefix, far_end, token_axis)",
        "dims = Shape (features)",
        "first = Constant <value_ints = [0]> ()",
        "batch = Gather <axis = 0> (dims, first)",
    ]
    if prefix:
        lines += [
            f"front_row = Constant <value = int64[1, {prefix}] {{{front}}}> ()",
            "one = Constant <value_ints = [1]> ()",
            "front_shape = Concat <axis = 0> (batch, one)",
            "front = Expand (front_row, front_shape)",
        ]
    if by_norm:
        lines += [
            f"how_many = Constant <value_ints = [{by_norm}]> ()",
            "largest, largest_at = TopK <axis = 1, largest = 1, sorted = 1> (patch_norms, how_many)",
            "at_float = Cast <to = 1> (largest_at)",
            "taken, taken_at = TopK <axis = 1, largest = 0, sorted = 1> (at_float, how_many)",
            "taken_patch = Cast <to = 7> (taken)",
            "taken_index = Add (taken_patch, prefix)",
        ]
    if spaced:
        lines += [
            "num_tokens = Gather <axis = 0> (dims, token_axis)",
            f"not_spaced = Constant <value_ints = [{prefix + by_norm}]> ()",
            "others = Sub (num_tokens, not_spaced)",
            f"odd = Constant <value_ints = [{odd}]> ()",
            f"twice = Constant <value_ints = [{2 * spaced}]> ()",
            "stretched = Mul (odd, others)",
            "position = Div (stretched, twice)",
            "position_float = Cast <to = 1> (position)",
            "position_axes = Constant <value_ints = [0, 2]> ()",
            "position_column = Unsqueeze (position_float, position_axes)",
            f"ranks = Constant <value_floats = [{ranks}]> ()",
            "shift = Sub (taken, ranks)",
            "shift_row = Unsqueeze (shift, token_axis)",
            "outside = Greater (shift_row, position_column)",
            "inside = Not (outside)",
            "inside_float = Cast <to = 1> (inside)",
            "skipped = ReduceSum <keepdims = 0> (inside_float, channel_axis)",
            "moved = Add (skipped, position_float)",
            "even_patch = Cast <to = 7> (moved)",
            "even_index = Add (even_patch, prefix)",
        ]
    joined = f"Concat <axis = 1> ({', '.join(parts)})"
    return "\n".join([*lines, f"joined = {joined}", "landmarks = Cast <to = 6> (joined)"]) + "\n}"


def _masked_attention_text(variant: FunctionVariant, opset: int) -> str:
    """Write exact attention with masked keys, in the type of its inputs, as PyTorch's exporter writes exact attention."""

    def cast(name: str, source: str) -> str:
        if variant.element_type == TensorProto.UNDEFINED:
            return f"{name} = CastLike ({source}, query)"
        return f"{name} = Cast <to = {variant.element_type}> ({source})"

    lines = [
        f"{MASKED_ATTENTION} <scale> (query, key, value, key_mask) => (out) {{",
        "scale = Constant <value_float: float = @scale> ()",
        "root_float = Sqrt (scale)",
        cast("root", "root_float"),
        "mask_flags = Cast <to = 9> (key_mask)",
        "mask_float = Cast <to = 1> (mask_flags)",
        f"masked_score = Constant <value_float = {MASKED_SCORE}> ()",
        "drop_flat = Mul (mask_float, masked_score)",
        "row_axes = Constant <value_ints = [1, 2]> ()",
        "drop_row = Unsqueeze (drop_flat, row_axes)",
    ]
    drop = "drop_row"
    if variant.sink:
        drop = "drop_pair"
        lines += [
            "one = Constant <value_float = 1.0> ()",
            "ordinary = Sub (one, mask_float)",
            "column_axes = Constant <value_ints = [1, 3]> ()",
            "ordinary_column = Unsqueeze (ordinary, column_axes)",
            "drop_pair = Mul (drop_row, ordinary_column)",
        ]
    return "\n".join(
        [
            *lines,
            cast("drop", drop),
            "key_columns = Transpose <perm = [0, 1, 3, 2]> (key)",
            "query_scaled = Mul (query, root)",
            "key_scaled = Mul (key_columns, root)",
            "scores_plain = MatMul (query_scaled, key_scaled)",
            "scores = Sub (scores_plain, drop)",
            "weights = Softmax <axis = -1> (scores)",
            "out = MatMul (weights, value)\n}",
        ]
    )


def _massive_tokens_text(variant: FunctionVariant, opset: int) -> str:
    square_sum = _reduce("ReduceSumSquare", "values", 2, "channel_axis", opset, keepdims=0)
    largest_gap = _reduce("ReduceMax", "gaps", 1, "token_axis", opset)
    return f"""{MASSIVE_TOKENS} (hidden) => (key_mask) {{
        values = Cast <to = 1> (hidden)
        channel_axis = Constant <value_ints = [2]> ()
        token_axis = Constant <value_ints = [1]> ()
        first = Constant <value_ints = [0]> ()
        before_last = Constant <value_ints = [-1]> ()
        far_end = Constant <value_ints = [9223372036854775807]> ()
        squared = {square_sum}
        smallest = Constant <value_float = 1.17549435e-38> ()
        safe = Max (squared, smallest)
        log_squared = Log (safe)
        half = Constant <value_float = 0.5> ()
        log_norms = Mul (log_squared, half)
        dims = Shape (hidden)
        num_tokens = Gather <axis = 0> (dims, token_axis)
        share = Constant <value_ints = [{LARGEST_SHARE}]> ()
        part = Div (num_tokens, share)
        most = Max (part, token_axis)
        looked_at = Add (most, token_axis)
        top, top_at = TopK <axis = 1, largest = 1, sorted = 1> (log_norms, looked_at)
        upper = Slice (top, first, before_last, token_axis)
        lower = Slice (top, token_axis, far_end, token_axis)
        gaps = Sub (upper, lower)
        gap = {largest_gap}
        place = ArgMax <axis = 1, keepdims = 1, select_last_index = 0> (gaps)
        threshold = GatherElements <axis = 1> (upper, place)
        above = GreaterOrEqual (log_norms, threshold)
        minimal = Constant <value_float = {MINIMAL_GAP:.9g}> ()
        enough = GreaterOrEqual (gap, minimal)
        massive = And (above, enough)
        {_patch_lines(variant.prefix_tokens, "log_norms")}
        chosen = And (massive, is_patch)
        key_mask = Cast <to = 6> (chosen)
    }}"""


def _artifact_tokens_text(variant: FunctionVariant, opset: int) -> str:
    mean = _reduce("ReduceMean", "weights", 1, "token_axis", opset, keepdims=0)
    return f"""{ARTIFACT_TOKENS} <scale> (query, key) => (key_mask) {{
        scale = Constant <value_float: float = @scale> ()
        query_float = Cast <to = 1> (query)
        key_float = Cast <to = 1> (key)
        first = Constant <value_ints = [0]> ()
        token_axis = Constant <value_ints = [1]> ()
        third_axis = Constant <value_ints = [2]> ()
        class_query = Slice (query_float, first, token_axis, third_axis)
        class_scaled = Mul (class_query, scale)
        key_columns = Transpose <perm = [0, 1, 3, 2]> (key_float)
        scores = MatMul (class_scaled, key_columns)
        weights = Softmax <axis = -1> (scores)
        mean = {mean}
        attention = Squeeze (mean, token_axis)
        own = Slice (attention, first, token_axis, token_axis)
        more = Greater (attention, own)
        {_patch_lines(variant.prefix_tokens, "attention")}
        chosen = And (more, is_patch)
        key_mask = Cast <to = 6> (chosen)
    }}"""


def _landmark_roles_text(variant: FunctionVariant, opset: int) -> str:
    """Write `fna.samplers.common.roles.landmark_roles`.

    A token's value is N less its position, so the first of some have the largest values.
    """
    prefix = min(variant.prefix_tokens, variant.num_landmarks)
    room = max(1, include_room(variant.num_landmarks, prefix))
    last = {name: _reduce("ReduceMin", f"{name}_top", 1, "token_axis", opset) for name in ("include", "exclude")}
    return f"""{LANDMARK_ROLES} (include, exclude) => (role) {{
        include_flag = Cast <to = 9> (include)
        exclude_flag = Cast <to = 9> (exclude)
        include_float = Cast <to = 1> (include_flag)
        exclude_float = Cast <to = 1> (exclude_flag)
        {_position_lines("include")}
        include_value = Mul (include_float, from_end)
        include_room = Constant <value_ints = [{room}]> ()
        include_top, include_at = TopK <axis = 1, largest = 1, sorted = 1> (include_value, include_room)
        include_last = {last["include"]}
        include_early = GreaterOrEqual (include_value, include_last)
        wanted = And (include_flag, include_early)
        exclude_value = Mul (exclude_float, from_end)
        {_exclude_room_lines()}
        exclude_top, exclude_at = TopK <axis = 1, largest = 1, sorted = 1> (exclude_value, exclude_room)
        exclude_last = {last["exclude"]}
        exclude_early = GreaterOrEqual (exclude_value, exclude_last)
        first_barred = And (exclude_flag, exclude_early)
        unwanted = Not (wanted)
        barred = And (first_barred, unwanted)
        last_prefix = Constant <value_float = {prefix - 0.5}> ()
        is_prefix = Less (position, last_prefix)
        not_barred = Not (barred)
        own_prefix = And (not_barred, is_prefix)
        guaranteed = Or (wanted, own_prefix)
        plus = Cast <to = 6> (guaranteed)
        minus = Cast <to = 6> (barred)
        role = Sub (plus, minus)
    }}"""


def _largest_norm_roles_text(variant: FunctionVariant, opset: int) -> str:
    """Write `fna.samplers.common.roles.largest_norm_roles`."""
    count = norm_grid_count(variant.num_landmarks, min(variant.prefix_tokens, variant.num_landmarks))
    square_sum = _reduce("ReduceSumSquare", "values", 2, "channel_axis", opset, keepdims=0)
    lines = [
        f"{LARGEST_NORM_ROLES} (features, role) => (roles) {{",
        "values = Cast <to = 1> (features)",
        "channel_axis = Constant <value_ints = [2]> ()",
        f"squared_norms = {square_sum}",
        "dims = Shape (squared_norms)",
    ]
    if not count:
        return "\n".join([*lines, "roles = Expand (role, dims)"]) + "\n}"
    lines += [
        "role_wide = Expand (role, dims)",
        *_away_lines(),
        "smallest = Constant <value_float = -1.0> ()",
        "norms = Where (away_flag, smallest, squared_norms)",
        f"how_many = Constant <value_ints = [{count}]> ()",
        "largest, largest_at = TopK <axis = 1, largest = 1, sorted = 1> (norms, how_many)",
        "one = Constant <value = int32[1, 1] {1}> ()",
        "places = Shape (largest_at)",
        "ones = Expand (one, places)",
        "roles = ScatterElements <axis = 1> (role_wide, largest_at, ones)",
    ]
    return "\n".join(lines) + "\n}"


def _guided_grid_text(variant: FunctionVariant, opset: int) -> str:
    """Write `fna.samplers.common.roles.guided_grid`: the p-th token outside a sorted set t is `p + #{j : t_j - j <= p}`."""
    count = variant.num_landmarks
    most = most_guaranteed(count, variant.prefix_tokens, by_norm=variant.middles)
    spread = (
        """twice_rank = Mul (two, rank)
        odd = Add (twice_rank, one)
        stretched = Mul (odd, free)
        twice_spaced = Mul (two, spaced)
        place = Div (stretched, twice_spaced)"""
        if variant.middles
        else """several = Sub (spaced, one)
        gaps = Max (several, one)
        length = Sub (free, one)
        twice_rank = Mul (two, rank)
        stretched = Mul (twice_rank, length)
        rounded = Add (stretched, gaps)
        twice_gaps = Mul (two, gaps)
        even = Div (rounded, twice_gaps)
        middle = Div (free, two)
        is_several = Greater (spaced_float, one_float)
        place = Where (is_several, even, middle)"""
    )
    return f"""{GUIDED_GRID} (role) => (landmarks, landmark_bias) {{
        {_position_lines("role")}
        {_own_lines(most, count)}
        away_count = ReduceSum <keepdims = 1> (away, token_axis)
        away_value = Mul (away, from_end)
        {_exclude_room_lines()}
        most = Constant <value_ints = [{most}]> ()
        rooms = Add (most, exclude_room)
        away_room = Min (rooms, num_tokens)
        away_top, away_top_at = TopK <axis = 1, largest = 1, sorted = 1> (away_value, away_room)
        is_away = Greater (away_top, half)
        away_place = Sub (num_tokens_float, away_top)
        two_float = Constant <value_float = 2.0> ()
        nowhere = Mul (num_tokens_float, two_float)
        away_at = Where (is_away, away_place, nowhere)
        away_places = Squeeze (away_room, first)
        away_order_whole = Range (step_zero, away_places, step_one)
        away_order = Cast <to = 1> (away_order_whole)
        shift = Sub (away_at, away_order)
        one_float = Constant <value_float = 1.0> ()
        count = Constant <value_float = {float(count)}> ()
        free_float = Sub (num_tokens_float, away_count)
        left = Sub (count, own_count)
        spaced_float = Max (left, one_float)
        rank = Cast <to = 7> (rank_float)
        free = Cast <to = 7> (free_float)
        spaced = Cast <to = 7> (spaced_float)
        one = Constant <value_int = 1> ()
        two = Constant <value_int = 2> ()
        {spread}
        place_float = Cast <to = 1> (place)
        third_axis = Constant <value_ints = [2]> ()
        place_column = Unsqueeze (place_float, third_axis)
        shift_row = Unsqueeze (shift, token_axis)
        beyond = Greater (shift_row, place_column)
        passed = Not (beyond)
        passed_float = Cast <to = 1> (passed)
        skipped = ReduceSum <keepdims = 0> (passed_float, third_axis)
        free_token = Add (place_float, skipped)
        chosen = Where (is_own, own_token, free_token)
        landmarks = Cast <to = 6> (chosen)
        others = Sub (num_tokens_float, own_count)
        weight = Div (others, spaced_float)
        log_weight = Log (weight)
        no_bias = Constant <value_float = 0.0> ()
        landmark_bias = Where (is_own, no_bias, log_weight)
    }}"""


def _guided_features_text(variant: FunctionVariant, opset: int) -> str:
    """Write `fna.samplers.common.roles.guided_features`."""
    return f"""{GUIDED_FEATURES} (features, role) => (guided) {{
        {_lines(_away_lines())}
        free_flag = Not (away_flag)
        free_float = Cast <to = 1> (free_flag)
        first_free = ArgMax <axis = 1, keepdims = 1, select_last_index = 0> (free_float)
        third_axis = Constant <value_ints = [2]> ()
        one = Constant <value_ints = [1]> ()
        zero = Constant <value_ints = [0]> ()
        dims = Shape (features)
        batch = Gather <axis = 0> (dims, zero)
        channels = Gather <axis = 0> (dims, third_axis)
        row_shape = Concat <axis = 0> (batch, one, channels)
        first_column = Unsqueeze (first_free, third_axis)
        first_row = Expand (first_column, row_shape)
        stand_in = GatherElements <axis = 1> (features, first_row)
        away_column = Unsqueeze (away_flag, third_axis)
        guided = Where (away_column, stand_in, features)
    }}"""


def _guided_picks_text(variant: FunctionVariant, opset: int) -> str:
    """Write `fna.samplers.common.roles.guided_picks`."""
    count = variant.num_landmarks
    return f"""{GUIDED_PICKS} (role, picks) => (landmarks) {{
        {_position_lines("role")}
        {_own_lines(most_guaranteed(count, 0, by_norm=False), count)}
        free_flag = Not (away_flag)
        free_float = Cast <to = 1> (free_flag)
        first_free = ArgMax <axis = 1, keepdims = 1, select_last_index = 0> (free_float)
        first_float = Cast <to = 1> (first_free)
        picks_float = Cast <to = 1> (picks)
        is_start = Less (picks_float, half)
        moved = Where (is_start, first_float, picks_float)
        dims = Shape (picks)
        rank_whole = Cast <to = 7> (rank_float)
        rank = Expand (rank_whole, dims)
        later = GatherElements <axis = 1> (moved, rank)
        chosen = Where (is_own, own_token, later)
        landmarks = Cast <to = 6> (chosen)
    }}"""


def _lines(lines: Iterable[str]) -> str:
    return "\n        ".join(lines)


def _position_lines(like: str) -> str:
    """Write `position`, `from_end` (N less the position), fp32 `[N]`, and N, for a tensor `[B, N]`."""
    return f"""token_axis = Constant <value_ints = [1]> ()
        first = Constant <value_ints = [0]> ()
        like_dims = Shape ({like})
        num_tokens = Gather <axis = 0> (like_dims, token_axis)
        num_tokens_float = Cast <to = 1> (num_tokens)
        step_zero = Constant <value_int = 0> ()
        step_one = Constant <value_int = 1> ()
        stop = Squeeze (num_tokens, first)
        position_whole = Range (step_zero, stop, step_one)
        position = Cast <to = 1> (position_whole)
        from_end = Sub (num_tokens_float, position)"""


def _exclude_room_lines() -> str:
    return f"""share = Constant <value_ints = [{LARGEST_SHARE}]> ()
        part = Div (num_tokens, share)
        exclude_room = Max (part, token_axis)"""


def _away_lines() -> list[str]:
    """Write `away_flag` and `away`, which tokens are not free; compared as fp32, which every builder does."""
    return [
        "role_float = Cast <to = 1> (role)",
        "role_size = Abs (role_float)",
        "half = Constant <value_float = 0.5> ()",
        "away_flag = Greater (role_size, half)",
        "away = Cast <to = 1> (away_flag)",
    ]


def _own_lines(most: int, count: int) -> str:
    """Write the guaranteed tokens in order: `own_token`, `is_own` and the rank of the others, `[B, S]`, after `_position_lines`."""
    slots = ", ".join(f"{slot}.0" for slot in range(count))
    columns = ", ".join(str(min(slot, most - 1)) for slot in range(count))
    return _lines(
        [
            *_away_lines(),
            "own_flag = Greater (role_float, half)",
            "own = Cast <to = 1> (own_flag)",
            "own_count = ReduceSum <keepdims = 1> (own, token_axis)",
            "own_value = Mul (own, from_end)",
            f"own_room = Constant <value_ints = [{most}]> ()",
            "own_top, own_top_at = TopK <axis = 1, largest = 1, sorted = 1> (own_value, own_room)",
            "own_at = Sub (num_tokens_float, own_top)",
            f"columns = Constant <value_ints = [{columns}]> ()",
            "own_token = Gather <axis = 1> (own_at, columns)",
            f"slot = Constant <value = float[1, {count}] {{{slots}}}> ()",
            "is_own = Greater (own_count, slot)",
            "rank_signed = Sub (slot, own_count)",
            "no_rank = Constant <value_float = 0.0> ()",
            "rank_float = Max (rank_signed, no_rank)",
        ]
    )


def _patch_lines(prefix_tokens: int, like: str) -> str:
    """Write `is_patch`, bool `[N]`, for a tensor `[B, N]`; floating-point, which every builder compares."""
    return f"""like_dims = Shape ({like})
        second = Constant <value_int = 1> ()
        like_tokens = Gather <axis = 0> (like_dims, second)
        like_zero = Constant <value_int = 0> ()
        position_whole = Range (like_zero, like_tokens, second)
        position = Cast <to = 1> (position_whole)
        last_prefix = Constant <value_float = {prefix_tokens - 0.5}> ()
        is_patch = Greater (position, last_prefix)"""


def _reduce(op_type: str, tensor: str, axis: int, axis_name: str, opset: int, keepdims: int = 1) -> str:
    """ReduceMax and ReduceSumSquare take their axes as an attribute up to opset 17, as an input from 18."""
    if opset >= 18:
        return f"{op_type} <keepdims = {keepdims}> ({tensor}, {axis_name})"
    return f"{op_type} <axes = [{axis}], keepdims = {keepdims}> ({tensor})"


def _type_name(element_type: int) -> str:
    return "any" if element_type == TensorProto.UNDEFINED else str(TensorProto.DataType.Name(element_type)).lower()
