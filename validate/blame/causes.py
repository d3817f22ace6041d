"""What is wrong with an FNA node that a step's error was traced to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from fna.observing import FocalCall, NystromCall, ReplacedCall
from fna.runtime import Arrays
from fna.validate.blame.effects import Pixels, fna_blocks
from fna.validate.blame.inside import BlockPartError, capture, part_names, run_marked
from fna.validate.budget.block_parts import BlockPart
from fna.validate.budget.chain import Chain
from fna.validate.budget.fna_nodes import (
    FnaNode,
    NodeProbe,
    expected_output,
    list_fna_nodes,
    planned_settings,
)
from fna.validate.budget.undoing import undo_nodes
from fna.validate.metrics import measure

_SAME = 1e-3
"""Relative L2 error under which two results of one formula count as the same when a cause is looked for."""


_ORDERS = {
    ("query", "value", "key"): "its key and value are exchanged",
    ("key", "query", "value"): "its query and key are exchanged",
    ("value", "key", "query"): "its query and value are exchanged",
}


def find_cause(chain: Chain, step: str, place: BlockPartError, pixels: Pixels) -> str | None:
    """Say what is wrong with the FNA node to blame."""
    proto = chain.portable if step == "export" and chain.portable is not None else chain.proto
    node = next((node for node in list_fna_nodes(proto) if node.block == place.block), None)
    if node is None:
        return None
    if step == "engine":
        return _engine_cause(chain, node, place)
    if chain.model is None:
        return next(_grafted_causes(chain, step, node, place, pixels), None)
    if step not in ("export", "precision"):
        return None
    if place.part != "fna":
        return "its FNA operator agrees, so its linear layers or norms differ"
    call = next(call for call in capture(chain, True, pixels).calls if call.block == place.block)
    arrays = NodeProbe(proto, chain.folder, chain.file.onnx.name).run(pixels)
    return next(_causes(node, call, arrays), None)


def _engine_cause(chain: Chain, node: FnaNode, place: BlockPartError) -> str | None:
    """What the block's FNA became in the engine; nothing more can be seen from outside."""
    assert chain.engine is not None
    layer = next((layer for layer in chain.engine.manifest.layers if layer.name == node.name), None)
    if place.part != "fna" or layer is None:
        return None
    how = "the plugin's kernels" if layer.implementation == "plugin" else "TensorRT's own operators"
    return f"node {node.name} runs on {how} in {layer.precision or layer.requested}"


def _grafted_causes(chain: Chain, step: str, node: FnaNode, place: BlockPartError, pixels: Pixels) -> Iterator[str]:
    """Against what graft wrote down about the original, and against exact attention in the original itself."""
    if place.part == "output":
        return
    yield from _setting_causes(
        node, planned_settings(node, chain.metadata), "the file's plan and table of the original say"
    )
    arrays = NodeProbe(chain.proto, chain.folder, chain.file.onnx.name).run(pixels)
    error = _error(expected_output(node, arrays), arrays[node.output].astype(np.float32))
    if not error <= 10 * _SAME:
        yield f"node {node.name} does not return FNA of its inputs (relative L2 error {error:.1e})"
    if step == "precision":
        return
    part = BlockPart(node.block, "fna")
    names = {part: part_names(chain)[part]}
    assert chain.reference is not None
    wanted = run_marked(chain.reference, chain, names)(pixels)[part]
    # everything before this node is the original's, then
    undone = undo_nodes(chain.proto, fna_blocks(chain), keep_masks=False)
    error = _error(wanted, run_marked(undone, chain, names)(pixels)[part])
    if error <= 10 * _SAME:
        return
    for order, text in _ORDERS.items():
        exchanged = _exchange_inputs(undone, node, order)
        if _error(wanted, run_marked(exchanged, chain, names)(pixels)[part]) <= 10 * _SAME:
            yield f"node {node.name}: {text}"
    yield (
        f"exact attention on what node {node.name} is given is not the original's (relative L2 error {error:.1e}), so its query, "
        "key or value is another"
    )


def _exchange_inputs(model: ModelProto, node: FnaNode, order: Sequence[str]) -> ModelProto:
    exchanged = ModelProto()
    exchanged.CopyFrom(model)
    target = next(other for other in exchanged.graph.node if other.name == node.name)
    target.input[:3] = [node.inputs[name] for name in order]
    return exchanged


def _setting_causes(node: FnaNode, needed: Mapping[str, float], whose: str) -> Iterator[str]:
    settings = {"scale": node.scale, **node.settings}
    for name, value in needed.items():
        if abs(settings[name] - value) > 1e-6 * abs(value):
            yield f"node {node.name} has {name} {settings[name]:g}, but {whose} {value:g}"


def _causes(node: FnaNode, call: ReplacedCall, arrays: Arrays) -> Iterator[str]:
    needed = {"scale": call.scale, **call.settings}
    yield from _setting_causes(node, needed, "the model has")
    own = expected_output(node, arrays)
    out = arrays[node.output]
    if not _error(own, out) <= 10 * _SAME:
        yield f"node {node.name} does not return FNA of its inputs (relative L2 error {_error(own, out):.1e})"
    wanted = call.out.numpy()
    for order, text in _ORDERS.items():
        if _error(wanted, expected_output(node, arrays, order=order)) <= 10 * _SAME:
            yield f"node {node.name}: {text}"
    chosen, kind = (call.tile_keys, "keys") if isinstance(call, FocalCall) else (call.landmarks, "landmarks")
    own_choice = arrays[node.inputs["tile_keys" if isinstance(call, FocalCall) else "landmarks"]]
    if own_choice.shape[-1] != chosen.shape[-1] or (own_choice[0] != chosen[0].numpy()).any():
        yield f"node {node.name} has other {kind} than the model"
    if not _same_mask(node, call, arrays):
        yield f"node {node.name} has another key mask than the model"
    errors = {
        name: _error(getattr(call, name).numpy(), arrays[node.inputs[name]]) for name in ("query", "key", "value")
    }
    worst = max(errors, key=lambda name: errors[name])
    yield f"what node {node.name} is given differs, most of all its {worst} (relative L2 error {errors[worst]:.1e})"


def _same_mask(node: FnaNode, call: ReplacedCall, arrays: Arrays) -> bool:
    name = node.inputs.get("key_mask")
    if name is None or call.key_mask is None:
        return (name is None) == (call.key_mask is None)
    mask, needed = np.atleast_2d(arrays[name])[0], np.atleast_2d(call.key_mask.numpy())[0]
    sink = isinstance(call, NystromCall) and call.sink
    return node.sink == sink and mask.shape == needed.shape and bool((mask == needed).all())


def _error(reference: NDArray[np.float32], actual: NDArray[np.float32]) -> float:
    if reference.shape != actual.shape:
        return float("inf")
    return measure("", reference, actual).judged
