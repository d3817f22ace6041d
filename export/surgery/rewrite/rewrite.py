"""Writing FNA into a graph: the new nodes, and the removal of what nothing needs any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fna.block_steps import LandmarkChoice, NamedTokens, steps_of
from fna.errors import InvalidPlanError
from fna.export.blocks import grafted_node_name
from fna.export.operators.artifact_tokens import ARTIFACT_TOKENS
from fna.export.operators.builder import Builder
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION, core_attributes
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.masked_attention import MASKED_ATTENTION
from fna.export.operators.massive_tokens import MASSIVE_TOKENS
from fna.export.operators.record import Operator
from fna.export.operators.registry import attach_functions
from fna.export.surgery.graph.files import export_model, names_read, original_model
from fna.export.surgery.graph.shapes import ShapePoint
from fna.export.surgery.graph.view import GraphView, all_inputs, input_names, output_names
from fna.export.surgery.recognise.rows import Attention, Dim, Operand, Result, Row
from fna.export.surgery.recognise.stream import Stream, count_prefix_tokens, find_stream
from fna.export.surgery.rewrite.compose import Site, compose
from fna.export.surgery.rewrite.focal import focal_lists
from fna.export.surgery.rewrite.insert import insert_nodes
from fna.plan import Plan
from fna.samplers import landmark_bias
from fna.samplers.common.roles import guided_landmarks_nodes
from fna.samplers.common.weights import landmark_bias_nodes
from fna.special_tokens import listed_tokens_mask

FUNCTIONS_IR_VERSION = 8


@dataclass
class Replacement:
    """One FNA node and the nodes around it."""

    row: Row
    fna: NodeProto
    before: list[NodeProto]
    after: list[NodeProto]
    query: str
    key: str
    value: str
    output: str
    site: Site | None
    constants: list[TensorProto] = field(default_factory=list)


@dataclass
class Rewritten:
    """A rewritten model, its large `weights` beside it, and what was put into it."""

    model: ModelProto
    weights: dict[str, TensorProto]
    replacements: list[Replacement]
    prefix_tokens: dict[int, int]
    features: dict[int, str]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Writer:
    graph: GraphView
    points: list[ShapePoint]
    plan: Plan
    taken: set[str]
    inserted: dict[int, list[NodeProto]] = field(default_factory=dict)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    prefix: dict[int, int] = field(default_factory=dict)
    features: dict[int, str] = field(default_factory=dict)
    shared: dict[Any, tuple[str, str]] = field(default_factory=dict)
    found_tokens: dict[Any, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def unique(self, name: str) -> str:
        """A name that nothing in the file has yet."""
        result, count = name, 1
        while result in self.taken:
            count += 1
            result = f"{name}_{count}"
        self.taken.add(result)
        return result

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initializer; equal ones are shared."""
        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        for known, other in self.initializers.items():
            if other.data_type == tensor.data_type and other.dims == tensor.dims and other.raw_data == tensor.raw_data:
                return known
        unique = self.unique(name)
        tensor.name = unique
        self.initializers[unique] = tensor
        return unique


def rewrite(graph: GraphView, points: list[ShapePoint], rows: Sequence[Row], plan: Plan) -> Rewritten:
    """Return a copy of the graph's model in which the attention of `rows` is FNA.

    Raises:
        InvalidPlanError: if the plan asks for what this graph cannot give (random landmarks for open sizes).
    """
    writer = _Writer(graph, points, plan, _names_taken(graph))
    replacements = [_replace(writer, row) for row in rows]
    for replacement in replacements:
        read = {name for node in replacement.before for name in names_read(node)}
        replacement.constants = [tensor for name, tensor in writer.initializers.items() if name in read]
    weights: dict[str, TensorProto] = {}
    model = export_model(insert_nodes(graph, writer.inserted, writer.initializers), weights)
    model.ir_version = max(model.ir_version, FUNCTIONS_IR_VERSION)
    types = {
        replacement.fna.name: replacement.row.attention.element_type
        for replacement in replacements
        if replacement.row.attention
    }
    common = next(iter(types.values())) if len(set(types.values())) == 1 else TensorProto.UNDEFINED
    attach_functions(model, common, types)
    return Rewritten(model, weights, replacements, writer.prefix, writer.features, list(dict.fromkeys(writer.notes)))


def _names_taken(graph: GraphView) -> set[str]:
    names = {name for node in graph.nodes for name in (node.name, *output_names(node), *all_inputs(node))}
    original = original_model(graph.graph).graph
    return names | {tensor.name for tensor in original.initializer} | {tensor.name for tensor in original.input}


def operand_nodes(
    graph: GraphView, points: list[ShapePoint], rows: Sequence[Row]
) -> tuple[list[NodeProto], dict[str, TensorProto], list[tuple[str, str, str]]]:
    """Nodes that make query, key and value `[B, H, N, D]` of each row, constants that they read, and the three names of each."""
    writer = _Writer(graph, points, Plan(num_blocks=max(1, len(rows))), _names_taken(graph))
    nodes: list[NodeProto] = []
    names = [_operands(writer, row, writer.unique(f"{row.node}/fna_operands_{row.block}"), nodes) for row in rows]
    return nodes, writer.initializers, names


def _operands(writer: _Writer, row: Row, prefix: str, nodes: list[NodeProto]) -> tuple[str, str, str]:
    assert row.attention is not None
    nodes.extend(row.attention.prelude)
    for tensor in row.attention.initializers:
        writer.initializers[tensor.name] = tensor
        writer.taken.add(tensor.name)
    query, key, value = (
        _operand_nodes(writer, operand, f"{prefix}/{name}", nodes)
        for name, operand in zip(("query", "key", "value"), row.attention.operands, strict=True)
    )
    return query, key, value


# ---------------------------------------------------------------- one block


def _replace(writer: _Writer, row: Row) -> Replacement:
    attention, steps = row.attention, steps_of(writer.plan, row.block)
    assert attention is not None
    prefix = writer.unique(grafted_node_name(row.node, row.block))
    before: list[NodeProto] = []
    query, key, value = _operands(writer, row, prefix, before)
    masking, step = steps.key_masking, steps.nystrom
    key_mask = [] if masking is None else [_tokens_mask(writer, masking.tokens, row, attention, query, key, before)]
    sink = int(masking is not None and masking.sink)
    attributes: dict[str, Any]
    if steps.focal is not None:
        prefix_tokens = _prefix_tokens(writer, row, attention)
        lists = focal_lists(writer, attention, steps.focal, prefix_tokens, row.block)
        inputs = [query, key, value, *lists, *key_mask]
        attributes = {"prefix_tokens": prefix_tokens, "hot": steps.focal.hot}
    elif step is None:
        inputs, attributes = [query, key, value, *key_mask], {"sink": sink}
    else:
        landmarks, bias = _landmarks(writer, row, step.landmarks, attention, (query, key, value), before)
        inputs = [query, key, value, landmarks, bias, *key_mask]
        attributes = core_attributes(step.iterations, step.chebyshev) | {"exact_rows": int(step.exact_rows)}
        attributes |= {"sink": sink} if key_mask else {}
    after: list[NodeProto] = []
    output = _result_nodes(writer, attention.result, prefix, after)

    def make_node(
        operator: Operator, inputs: Sequence[str], result: str, name: str, settings: dict[str, Any]
    ) -> NodeProto:
        return operator.make_node(inputs, [result], name, scale=float(attention.scale), **settings)

    around: list[NodeProto] = []
    site = None
    if step is None:
        whole = MASKED_ATTENTION if steps.focal is None else FOCAL_ATTENTION
        fna = make_node(whole, inputs, output, prefix, attributes)
    else:
        site = Site(attention, steps, step, writer.prefix[row.block], prefix, query, key, value, inputs[3])

        def make_fna(query: str, key: str, value: str, result: str) -> NodeProto:
            return make_node(FAST_NYSTROM_ATTENTION, [query, key, value, *inputs[3:]], result, prefix, attributes)

        def make_masked(query: str, key: str, value: str, result: str) -> NodeProto:
            return make_node(
                MASKED_ATTENTION, [query, key, value, *key_mask], result, f"{prefix}/exact", {"sink": sink}
            )

        fna, around = compose(writer, site, output, make_fna, make_masked if key_mask else None)
    writer.inserted[writer.graph.producer[attention.result.tensor]] = [*before, fna, *around, *after]
    return Replacement(row, fna, before, after, query, key, value, output, site)


def _reshape_node(
    writer: _Writer, tensor: str, target: tuple[int | Dim, ...], output: str, nodes: list[NodeProto]
) -> None:
    if all(isinstance(size, int) for size in target):
        shape = writer.constant("fna/shape_" + "_".join(str(size) for size in target), np.asarray(target, np.int64))
    else:
        parts = []
        for position, size in enumerate(target):
            if isinstance(size, int):
                parts.append(writer.constant(f"fna/size_{size}", np.asarray([size], np.int64)))
                continue
            dims, picked = writer.unique(f"{output}/dims_{position}"), writer.unique(f"{output}/size_{position}")
            index = writer.constant(f"fna/axis_{size.axis}", np.asarray([size.axis], np.int64))
            nodes.append(helper.make_node("Shape", [size.tensor], [dims], name=dims))
            nodes.append(helper.make_node("Gather", [dims, index], [picked], name=picked, axis=0))
            parts.append(picked)
        shape = writer.unique(f"{output}/shape")
        nodes.append(helper.make_node("Concat", parts, [shape], name=shape, axis=0))
    nodes.append(helper.make_node("Reshape", [tensor, shape], [output], name=f"{output}/Reshape"))


def _operand_nodes(writer: _Writer, operand: Operand, name: str, nodes: list[NodeProto]) -> str:
    tensor = operand.tensor
    if operand.reshape is not None:
        reshaped = writer.unique(f"{name}_reshaped")
        _reshape_node(writer, tensor, operand.reshape, reshaped, nodes)
        tensor = reshaped
    if operand.perm is not None:
        turned = writer.unique(name)
        nodes.append(helper.make_node("Transpose", [tensor], [turned], name=f"{turned}/Transpose", perm=operand.perm))
        tensor = turned
    return tensor


def _result_nodes(writer: _Writer, result: Result, prefix: str, nodes: list[NodeProto]) -> str:
    if result.perm is None and result.reshape is None:
        return result.tensor
    output = current = writer.unique(f"{prefix}/out")
    if result.perm is not None:
        turned = result.tensor if result.reshape is None else writer.unique(f"{prefix}/out_transposed")
        nodes.append(
            helper.make_node("Transpose", [current], [turned], name=f"{prefix}/out/Transpose", perm=result.perm)
        )
        current = turned
    if result.reshape is not None:
        _reshape_node(writer, current, result.reshape, result.tensor, nodes)
    return output


# ---------------------------------------------------------------- masked keys


def _tokens_mask(
    writer: _Writer, named: NamedTokens, row: Row, attention: Attention, query: str, key: str, nodes: list[NodeProto]
) -> str:
    """The name of a mask `[B or 1, N]` of tokens that the plan names, found at the first block that asks for them."""
    tower = (attention.tokens, _origin(writer, find_stream(writer.graph, writer.points, attention), attention))
    if (named, tower) not in writer.found_tokens:
        writer.found_tokens[named, tower] = _find_tokens(writer, row, named, attention, query, key, nodes)
    return writer.found_tokens[named, tower]


def _find_tokens(
    writer: _Writer, row: Row, named: NamedTokens, attention: Attention, query: str, key: str, nodes: list[NodeProto]
) -> str:
    if isinstance(named.tokens, tuple):
        if len(set(attention.tokens)) > 1:
            raise InvalidPlanError("token indices in a plan need a fixed number of tokens; this file leaves it open")
        mask = listed_tokens_mask(named.tokens, attention.tokens[0])
        return writer.constant(f"fna/listed_tokens_{row.block}", mask.numpy())
    name = writer.unique(f"{row.node}/fna_{named.tokens}_tokens_{row.block}")
    stream = find_stream(writer.graph, writer.points, attention)
    prefix = writer.plan.prefix_tokens
    if prefix is None:
        prefix = _detect_prefix(writer, attention, stream)
    if named.tokens == "massive":
        if stream is None:
            raise InvalidPlanError(
                f"massive tokens cannot be found in block {row.block}: its hidden states could not be found"
            )
        nodes.append(
            MASSIVE_TOKENS.make_node([_hidden_states(writer, row, stream, nodes)], [name], name, prefix_tokens=prefix)
        )
    else:
        if prefix < 1:
            raise InvalidPlanError(
                "artifact tokens are those that the class token looks at, but no class token was found; name massive tokens, "
                "or give --prefix-tokens"
            )
        scale = float(attention.scale)
        nodes.append(ARTIFACT_TOKENS.make_node([query, key], [name], name, scale=scale, prefix_tokens=prefix))
    return name


def _hidden_states(writer: _Writer, row: Row, stream: Stream, nodes: list[NodeProto]) -> str:
    """The residual stream as `[B, N, C]`."""
    if not stream.sequence_first:
        return stream.tensor
    turned = writer.unique(f"{row.node}/fna_features_{row.block}")
    nodes.append(helper.make_node("Transpose", [stream.tensor], [turned], name=turned, perm=(1, 0, 2)))
    return turned


# ---------------------------------------------------------------- landmarks


def _prefix_tokens(writer: _Writer, row: Row, attention: Attention) -> int:
    """The class and register tokens of one block's tower, noted for the proof."""
    prefix = writer.plan.prefix_tokens
    if prefix is None:
        prefix = _detect_prefix(writer, attention, find_stream(writer.graph, writer.points, attention))
    writer.prefix[row.block] = prefix
    return prefix


def _landmarks(
    writer: _Writer,
    row: Row,
    choice: LandmarkChoice,
    attention: Attention,
    operands: tuple[str, str, str],
    nodes: list[NodeProto],
) -> tuple[str, str]:
    """Names of the landmarks `[B or 1, S]` and of their bias `[1, S]` for one block."""
    stream = find_stream(writer.graph, writer.points, attention)
    prefix = _prefix_tokens(writer, row, attention)
    static = len(set(attention.tokens)) == 1
    sampler, count = choice.sampler, choice.num_landmarks
    by_features = sampler.looks_at_features
    origin = _origin(writer, stream, attention) if by_features or choice.is_guided or not static else None
    key = (choice.group, attention.tokens, prefix, origin)
    if key in writer.shared:
        return writer.shared[key]
    if not static and not sampler.takes_open_size:
        raise InvalidPlanError(
            f"{sampler.name} landmarks need a fixed number of tokens; this file leaves its input size open"
        )
    features = _features(writer, row, choice, stream, operands, nodes) if by_features else ""
    if by_features:
        writer.features[row.block] = features
    tokens = min(attention.tokens)
    request = choice.request(tokens, prefix)
    op = Builder(writer.graph.opset, prefix=f"{row.node}/fna_landmarks_{row.block}/", taken=writer.taken)
    if choice.is_guided:
        choice.check_rooms(tokens, prefix, f"block {row.block}")
        include, exclude = (
            None if named is None else _tokens_mask(writer, named, row, attention, *operands[:2], nodes)
            for named in (choice.include, choice.exclude)
        )
        landmarks, bias = guided_landmarks_nodes(op, request, sampler.name, features or None, include, exclude)
        if not choice.weighted or bias is None:
            bias = writer.constant(f"fna/landmark_bias_0_{count}", np.zeros((1, count), np.float32))
        _add_sampler_nodes(op, nodes)
        writer.shared[key] = (landmarks, bias)
        return landmarks, bias
    if by_features:
        assert sampler.nodes is not None, f"{sampler.name} looks at features, so it has nodes"
        landmarks = sampler.nodes(op, features, request)
    elif static:
        name = f"fna/landmarks_{sampler.name}_{count}_of_{tokens}"
        landmarks = writer.constant(name, sampler.select(request, None).numpy().astype(np.int32))
    else:
        assert sampler.open_size_nodes is not None
        landmarks = sampler.open_size_nodes(op, _token_count(op, operands[1]), request)
    own = sampler.stand_alone(count, prefix)
    name = f"fna/landmark_bias_{sampler.name}_{count}"
    if not choice.weighted or own == count:
        bias = writer.constant(name, np.zeros((1, count), np.float32))
    elif static:
        weights = landmark_bias(tokens, count, method=sampler.name, prefix_tokens=prefix)
        bias = writer.constant(f"{name}_of_{tokens}", weights.numpy().astype(np.float32))
    else:
        bias = landmark_bias_nodes(op, _token_count(op, operands[1]), count, own)
    _add_sampler_nodes(op, nodes)
    writer.shared[key] = (landmarks, bias)
    return landmarks, bias


def _token_count(op: Builder, tensor: str) -> str:
    """N of `[B, H, N, D]`, as int64 `[1]`."""
    return str(op.Gather(op.Shape(tensor), [2], axis=0))


def _add_sampler_nodes(op: Builder, nodes: list[NodeProto]) -> None:
    """Name the nodes after what they write."""
    for node in op.nodes:
        node.name = node.output[0]
    nodes.extend(op.nodes)


def _origin(writer: _Writer, stream: Stream | None, attention: Attention) -> str:
    """What tells one tower of a model from another: the first tensor of data that its stream is computed from."""
    start = stream.tensor if stream is not None else attention.query.tensor
    names = writer.graph.needed_for({start})
    inputs = {tensor.name for tensor in writer.graph.inputs}
    used = {name for index in names for name in input_names(writer.graph.nodes[index]) if name in inputs}
    return ",".join(sorted(used))


def _detect_prefix(writer: _Writer, attention: Attention, stream: Stream | None) -> int:
    key = ("prefix", attention.tokens, _origin(writer, stream, attention))
    if key in writer.shared:
        return int(writer.shared[key][0])
    count = None if stream is None else count_prefix_tokens(writer.graph, writer.points, stream)
    result = 0 if count is None or count >= min(attention.tokens) else count
    if count is None or count != result:
        writer.notes.append(
            "how many prefix tokens there are could not be told, so 0 are assumed; give --prefix-tokens"
        )
    if count is not None:
        writer.shared[key] = (str(result), "")
    return result


def _features(
    writer: _Writer,
    row: Row,
    choice: LandmarkChoice,
    stream: Stream | None,
    operands: tuple[str, str, str],
    nodes: list[NodeProto],
) -> str:
    if choice.feature == "input" and stream is not None:
        return _hidden_states(writer, row, stream, nodes)
    if choice.feature == "input":
        writer.notes.append(
            f"block {row.block}: its hidden states could not be found, so landmarks are chosen from its queries, averaged over heads"
        )
    operand = {"query": 0, "key": 1, "value": 2}.get(choice.feature, 0)
    mean = writer.unique(f"{row.node}/fna_features_{row.block}")
    if writer.graph.opset >= 18:
        axis = writer.constant("fna/heads_axis", np.asarray([1], np.int64))
        nodes.append(helper.make_node("ReduceMean", [operands[operand], axis], [mean], name=mean, keepdims=0))
    else:
        nodes.append(helper.make_node("ReduceMean", [operands[operand]], [mean], name=mean, axes=[1], keepdims=0))
    return mean
