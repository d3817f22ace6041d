"""Proof that a replacement is right, in onnxruntime.

First, block by block: the operands that were recovered are fed with random numbers, large enough that the softmax is far from
uniform, to the original nodes of the block and to exact attention with the recovered scale. Second, the whole
rewritten file runs on random input and every FNA node's output is compared with FNA in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fna.errors import InputFileError
from fna.export.operators.fast_nystrom_attention import core_of
from fna.export.operators.focal_attention import FOCAL_ATTENTION
from fna.export.operators.masked_attention import MASKED_ATTENTION
from fna.export.operators.registry import node_attributes
from fna.export.surgery.graph.files import names_read, node_proto, tensor_proto
from fna.export.surgery.graph.fold import numpy_type
from fna.export.surgery.graph.shapes import ShapePoint
from fna.export.surgery.graph.view import GraphView, all_inputs, output_names
from fna.export.surgery.recognise.rows import Attention
from fna.export.surgery.rewrite.rewrite import Replacement, Rewritten
from fna.runtime import open_session, run_session
from fna.threads import one_thread

TOLERANCE = {TensorProto.FLOAT: 1e-4, TensorProto.FLOAT16: 2e-2, TensorProto.BFLOAT16: 5e-2}
"""Largest error over largest value, by element type."""

SCORE_SPREAD = 1.5
"""Standard deviation of the scores that random operands are scaled to."""

MOST_ROWS = 64
"""Queries per head that a block is compared at; they are evenly spaced."""

LONGEST_RUN_S = 45.0
LARGEST_RUN_BYTES = 6 << 30


class CheckImpossibleError(Exception):
    """onnxruntime cannot run what would have to be run."""


@dataclass
class Proof:
    """What the check found."""

    block_errors: dict[int, float] = field(default_factory=dict)
    fna_errors: dict[int, float] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def prove_blocks(graph: GraphView, points: Sequence[ShapePoint], rewritten: Rewritten, seed: int = 0) -> Proof:
    """Compare each original block with exact attention of the operands that were recovered for it."""
    proof = Proof()
    generator = np.random.default_rng(seed)
    proven: dict[bytes, float] = {}
    for replacement in rewritten.replacements:
        block, attention = replacement.row.block, replacement.row.attention
        assert attention is not None
        limit = TOLERANCE[attention.element_type]
        try:
            by_tokens = dict(zip(attention.tokens, points, strict=True))
            error = max(_block_error(graph, point, replacement, generator, proven) for point in by_tokens.values())
        except CheckImpossibleError as problem:
            proof.failed[block] = f"could not be checked: {problem} (--no-check replaces it unchecked)"
            continue
        proof.block_errors[block] = error
        if not error <= limit:
            proof.failed[block] = (
                f"exact attention with what was recovered differs by {error:.1e} (at most {limit:.0e})"
            )
    return proof


def prove_file(rewritten: Rewritten, points: Sequence[ShapePoint], folder: Path, proof: Proof, seed: int = 0) -> None:
    """Run the rewritten file and compare every FNA node with FNA in PyTorch; failures go into `proof`.

    Raises:
        InputFileError: if onnxruntime cannot run the file at all.
    """
    names = [
        [replacement.query, replacement.key, replacement.value, *replacement.fna.input[3:], replacement.output]
        for replacement in rewritten.replacements
    ]
    model = rewritten.model
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted = list(dict.fromkeys(name for group in names for name in group if name not in constants))
    held = [_live_bytes(model, point, wanted) for point in points]
    live = min(held)
    point = points[held.index(live)]
    if live > LARGEST_RUN_BYTES:
        raise InputFileError(
            f"the file is too large to check (up to {live / 2**30:.0f} GiB of its tensors are needed at once); use --no-check"
        )
    outputs = list(model.graph.output)
    have = {output.name for output in outputs}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in have)
    feeds = random_feeds(model, point, np.random.default_rng(seed))
    try:
        # the weights are not copied: onnxruntime would hold them as text, as it reads them, and as it uses them
        weights = {name: numpy_helper.to_array(tensor) for name, tensor in rewritten.weights.items()}
        session = open_session(model, folder=folder, optimise=False, once=True, weights=weights)
        values = run_session(session, feeds, wanted, longest_s=LONGEST_RUN_S)
    except InputFileError as problem:
        raise InputFileError(
            f"the rewritten file cannot be checked: {problem}; --no-check writes it unchecked"
        ) from None
    finally:
        del model.graph.output[len(outputs) :]
    for name in {name for group in names for name in group if name in constants}:
        values[name] = numpy_helper.to_array(constants[name])
    for replacement, group in zip(rewritten.replacements, names, strict=True):
        _compare_with_torch(replacement, [values[name] for name in group], proof)


def _compare_with_torch(replacement: Replacement, values: Sequence[NDArray[Any]], proof: Proof) -> None:
    import torch

    from fna.attention import nystrom_attention_reference
    from fna.block_steps import wire_block
    from fna.composition import TorchWiring
    from fna.focal import focal_attention_reference
    from fna.special_tokens import masked_attention

    # the last image is enough: a mistake that spared it would have to know how many there are
    arrays = [torch.from_numpy(np.array(array)) for array in values]
    query, key, value, out = (tensor[-1:] for tensor in (*arrays[:3], arrays[-1]))
    lists = arrays[3:7] if FOCAL_ATTENTION.is_called_by(replacement.fna) else []
    others = [tensor[-1:] for tensor in arrays[3 + len(lists) : -1]]
    attention, block = replacement.row.attention, replacement.row.block
    assert attention is not None
    if not all(torch.isfinite(tensor).all() for tensor in (query, key, value)):
        proof.failed[block] = "could not be checked: its operands overflow on random input"
        return
    site, scale = replacement.site, float(np.float32(attention.scale))
    settings = node_attributes(replacement.fna)
    sink = bool(settings.get("sink", 0))
    masked = (
        others
        if FOCAL_ATTENTION.is_called_by(replacement.fna) or MASKED_ATTENTION.is_called_by(replacement.fna)
        else others[2:]
    )
    key_mask = masked[-1] if masked else None

    def nystrom(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        landmarks, bias = others[:2]
        return nystrom_attention_reference(
            query, key, value, landmarks, bias, scale,
            int(settings["iterations"]), bool(settings["exact_rows"]), key_mask, sink, core_of(settings),
        )  # fmt: skip

    def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        operands = (query.float(), key.float(), value.float())
        if key_mask is not None:
            return masked_attention(*operands, key_mask, scale, sink).to(query.dtype)
        return torch.nn.functional.scaled_dot_product_attention(*operands, scale=scale).to(query.dtype)

    with one_thread():
        if lists:
            tile_queries, tile_keys, tile_bias, places = lists
            expected = focal_attention_reference(
                query, key, value, tile_queries, tile_keys, tile_bias, places, key_mask,
                int(settings["prefix_tokens"]), int(settings["hot"]), scale,
            )  # fmt: skip
        elif site is None:
            expected = exact(query, key, value)
        else:
            step = site.step
            wiring = TorchWiring(nystrom, exact, others[0], site.prefix_tokens, step.landmarks.patches, step.exact_rows)
            expected = wire_block(site.steps, query.shape[1], query, key, value, wiring)
    error = relative_error(out.float().numpy(), expected.float().numpy())
    limit = TOLERANCE[attention.element_type]
    proof.fna_errors[block] = error
    if not error <= limit:
        proof.failed[block] = f"its FNA node differs from PyTorch by {error:.1e} (at most {limit:.0e})"


def relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest expected value; infinite where either is not finite or the shapes differ."""
    if actual.shape != expected.shape or not np.isfinite(actual).all() or not np.isfinite(expected).all():
        return float("inf")
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-30))


# ---------------------------------------------------------------- one block


def _block_error(
    graph: GraphView,
    point: ShapePoint,
    replacement: Replacement,
    generator: np.random.Generator,
    proven: dict[bytes, float],
) -> float:
    """Error of one block at one size; `proven` has those of blocks that are the same nodes and constants, and is added to."""
    attention = replacement.row.attention
    assert attention is not None
    written = {name for node in replacement.before for name in node.output}
    cuts = [
        name for node in replacement.before for name in names_read(node) if name in graph.data and name not in written
    ]
    cuts += [name for name in (replacement.query, replacement.key, replacement.value) if name not in written]
    cuts = list(dict.fromkeys(cuts))
    nodes, loose = _region(graph, attention.result.tensor, set(cuts))
    before = [node for node in replacement.before if node.domain != "fna" and "fna_landmarks" not in node.name]
    before = _needed(before, [replacement.query, replacement.key, replacement.value])
    outputs = [attention.result.tensor, replacement.query, replacement.key, replacement.value]
    feed_names = [*cuts, *loose]
    for name in feed_names:
        if point.shapes.get(name) is None or not point.types.get(name):
            raise CheckImpossibleError(f"the shape of {name!r} is not known")
    region = _region_model(graph, point, [*nodes, *before], attention.initializers, feed_names, outputs, replacement)
    same = _same_for_every_block(region, point, feed_names, attention)
    if same not in proven:
        feeds = {name: _random(graph, point, name, generator) for name in feed_names}
        proven[same] = _error_on(graph, point, replacement, nodes, before, cuts, feeds)
    return proven[same]


def _same_for_every_block(region: ModelProto, point: ShapePoint, feeds: Sequence[str], attention: Attention) -> bytes:
    """All that a block's error depends on but random numbers: its nodes and constants without their names, sizes, scale.

    The layers of a transformer mostly differ in their weights alone, which lie outside of the nodes between query, key, value
    and output: what is proven of one is proven of all.
    """
    known = ModelProto()
    known.CopyFrom(region)
    numbers: dict[str, str] = {"": ""}

    def number(name: str) -> str:
        return numbers.setdefault(name, str(len(numbers)))

    if any(
        attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS)
        for node in known.graph.node
        for attribute in node.attribute
    ):
        return known.SerializeToString()
    for named in (*known.graph.input, *known.graph.output, *known.graph.initializer):
        named.name = number(named.name)
        del named.metadata_props[:]
        named.doc_string = ""
    for node in known.graph.node:
        node.input[:] = [number(name) for name in node.input]
        node.output[:] = [number(name) for name in node.output]
        node.name = node.doc_string = ""
        del node.metadata_props[:]
    settings = ([point.shapes.get(name) for name in feeds], attention.result.perm, attention.scale, attention.head_size)
    return known.SerializeToString(deterministic=True) + repr(settings).encode()


def _error_on(
    graph: GraphView,
    point: ShapePoint,
    replacement: Replacement,
    nodes: Sequence[NodeProto],
    before: Sequence[NodeProto],
    cuts: Sequence[str],
    feeds: dict[str, NDArray[Any]],
) -> float:
    """Run a block's nodes and exact attention with what was recovered on the same operands."""
    attention = replacement.row.attention
    assert attention is not None
    query_and_key = [replacement.query, replacement.key]
    query, key = _region_values(graph, point, before, attention.initializers, feeds, query_and_key, replacement)
    spread = abs(attention.scale) * float(query.std()) * float(key.std()) * attention.head_size**0.5
    factor = (SCORE_SPREAD / max(spread, 1e-6)) ** 0.5
    feeds = {
        name: (value.astype(np.float32) * factor).astype(value.dtype)
        if name in cuts and value.dtype.kind == "f"
        else value
        for name, value in feeds.items()
    }
    outputs = [attention.result.tensor, replacement.query, replacement.key, replacement.value]
    reference, query, key, value = _region_values(
        graph, point, [*nodes, *before], attention.initializers, feeds, outputs, replacement
    )
    if reference.size != query.size:
        return float("inf")
    perm = attention.result.perm or (0, 1, 2, 3)
    reference = reference.reshape([query.shape[axis] for axis in perm]).transpose(np.argsort(perm))
    rows = np.unique(np.linspace(0, query.shape[2] - 1, MOST_ROWS).astype(int))
    exact = exact_attention(query[:, :, rows], key, value, attention.scale)
    return relative_error(reference[:, :, rows].astype(np.float64), exact)


def exact_attention(
    query: NDArray[Any],  # [B, H, R, D]
    key: NDArray[Any],  # [B, H, N, D]
    value: NDArray[Any],  # [B, H, N, D]
    scale: float,
) -> NDArray[np.float32]:  # [B, H, R, D]
    """softmax(scale * Q K^T) V in fp32, whatever the type of the operands."""
    import torch

    with one_thread():
        q, k, v = (torch.from_numpy(np.ascontiguousarray(array, np.float32)) for array in (query, key, value))
        result: NDArray[np.float32] = (torch.softmax(scale * (q @ k.mT), dim=-1) @ v).numpy()
    return result


def _needed(nodes: Sequence[NodeProto], names: Sequence[str]) -> list[NodeProto]:
    wanted = set(names)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if any(name in wanted for name in node.output):
            kept.insert(0, node)
            wanted.update(names_read(node))
    return kept


def _region(graph: GraphView, output: str, cuts: set[str]) -> tuple[list[NodeProto], list[str]]:
    """The original nodes between the cuts and a block's output, and other tensors of data that they read."""
    indices: set[int] = set()
    loose: list[str] = []
    todo = [output]
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in cuts or name in seen:
            continue
        seen.add(name)
        if name not in graph.producer:
            if name not in graph.initializers:
                loose.append(name)
            continue
        index = graph.producer[name]
        indices.add(index)
        node = graph.nodes[index]
        for read in all_inputs(node):
            if node.op in ("Shape", "Size") and read in graph.data and read not in cuts:
                loose.append(read)
            else:
                todo.append(read)
    inside = {name for index in indices for name in output_names(graph.nodes[index])}
    return [node_proto(graph.nodes[index]) for index in sorted(indices)], [
        name for name in dict.fromkeys(loose) if name not in inside
    ]


def _random(graph: GraphView, point: ShapePoint, name: str, generator: np.random.Generator) -> NDArray[Any]:
    shape, dtype = point.shapes[name], numpy_type(point.types[name])
    assert shape is not None, name
    if dtype.kind == "f" or dtype.name == "bfloat16":
        return generator.standard_normal(shape, dtype=np.float32).astype(dtype)
    return np.ones(shape, dtype)


def _region_values(
    graph: GraphView,
    point: ShapePoint,
    nodes: Sequence[NodeProto],
    extra: Sequence[TensorProto],
    feeds: dict[str, NDArray[Any]],
    outputs: Sequence[str],
    replacement: Replacement,
) -> list[NDArray[Any]]:
    """Values of tensors of a region; those that are fed are handed back."""
    wanted = [name for name in dict.fromkeys(outputs) if name not in feeds]
    arrays = dict(feeds)
    if wanted:
        model = _region_model(graph, point, nodes, extra, feeds, wanted, replacement)
        try:
            session = open_session(model, folder=graph.folder, optimise=False, once=True)
            arrays |= run_session(session, feeds, wanted, longest_s=LONGEST_RUN_S)
        except InputFileError as error:
            raise CheckImpossibleError(str(error)) from None
    return [arrays[name] for name in outputs]


def _region_model(
    graph: GraphView,
    point: ShapePoint,
    nodes: Sequence[NodeProto],
    extra: Sequence[TensorProto],
    feeds: Iterable[str],
    outputs: Sequence[str],
    replacement: Replacement,
) -> ModelProto:
    names = {name for node in nodes for name in names_read(node)}
    initializers = [tensor_proto(graph.initializers[name]) for name in sorted(names) if name in graph.initializers]
    known = {tensor.name for tensor in initializers}
    initializers += [
        tensor for tensor in [*extra, *replacement.constants] if tensor.name in names and tensor.name not in known
    ]
    inputs = [
        helper.make_tensor_value_info(name, point.types[name], [None] * len(point.shapes[name] or ())) for name in feeds
    ]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    proto = helper.make_graph(list(nodes), "block", inputs, results, initializers)
    model = helper.make_model(proto, ir_version=max(graph.graph.ir_version or 0, 8))
    del model.opset_import[:]
    model.opset_import.extend(graph.graph.import_domains)
    return model


# ---------------------------------------------------------------- running


def random_feeds(model: ModelProto, point: ShapePoint, generator: np.random.Generator) -> dict[str, NDArray[Any]]:
    """Random input for a whole file: normal images, small token numbers, masks that mask nothing."""
    feeds: dict[str, NDArray[Any]] = {}
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in constants:
            continue
        dtype = numpy_type(value.type.tensor_type.elem_type)
        shape = point.feeds[value.name]
        if dtype.kind == "f" or dtype.name == "bfloat16":
            feeds[value.name] = generator.standard_normal(shape, dtype=np.float32).astype(dtype)
        elif dtype.kind == "b" or "mask" in value.name.lower():
            feeds[value.name] = np.ones(shape, dtype)
        else:
            feeds[value.name] = generator.integers(0, 4, shape).astype(dtype)
    return feeds


def _live_bytes(model: ModelProto, point: ShapePoint, kept: Sequence[str]) -> float:
    """The most bytes of tensors that a run of `model` holds at once, of those whose shape at `point` is known.

    A tensor is held from the node that writes it to the last that reads it, and those in `kept` to the end.
    """
    last_read = {name: index for index, node in enumerate(model.graph.node) for name in names_read(node)}
    held = dict.fromkeys((*kept, *(output.name for output in model.graph.output)))
    ends: dict[int, float] = {}
    live = most = 0.0
    for index, node in enumerate(model.graph.node):
        for name in node.output:
            shape = point.shapes.get(name)
            if shape is None or (name not in last_read and name not in held):
                continue
            size = 4.0 * float(np.prod(shape, dtype=np.float64))
            live += size
            if name not in held:
                ends[last_read[name]] = ends.get(last_read[name], 0.0) + size
        most = max(most, live)
        live -= ends.pop(index, 0.0)
    return most
