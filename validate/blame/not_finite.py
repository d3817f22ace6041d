"""The first tensor that holds NaN or infinite values, with the node that wrote it and the block that the node belongs to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fna.errors import InputFileError
from fna.export.operators.registry import fna_nodes
from fna.export.passes.lower import lower
from fna.export.sources.running import patched, run_torch
from fna.validate.budget.block_parts import block_of, layer_numbers
from fna.validate.budget.chain import Chain, inspect_engine
from fna.validate.budget.fna_nodes import mark_outputs
from fna.validate.budget.rounding import has_low_types, round_everywhere
from fna.validate.budget.runners import OnnxRunner

_TENSORS_AT_ONCE = 24
"""Tensors handed out by one run; all of a model's would not fit into memory."""


class NotFinite(BaseModel):
    """The first tensor that is not finite.

    Attributes:
        step: of the budget.
        image: on which.
        tensor: its name; in PyTorch the module that returned it.
        node: the node that wrote it, by name; in PyTorch the module's class.
        op_type: the node's operator.
        block: that the node belongs to; None outside of blocks.
        count: NaN and infinite values in it.
        largest_before: largest magnitude among the node's inputs: above 65504 is what fp16 cannot hold.
        since: in an engine, which shows some of its tensors only: the last one before that is finite.
    """

    model_config = ConfigDict(frozen=True)

    step: str
    image: str
    tensor: str
    node: str
    op_type: str
    block: int | None
    count: int
    largest_before: float | None = None
    since: str | None = None

    def describe(self) -> str:
        """Say it in one line."""
        where = f"in block {self.block}"
        if self.block is None:
            where = "outside of the blocks" if self.since is None else "in a block that its name does not tell"
        size = "" if self.largest_before is None else f", whose inputs reach {self.largest_before:.3g}"
        size += "" if self.since is None else f", the first of the engine's debug tensors after {self.since}"
        return (
            f"{self.step}: {self.count} NaN or infinite values on {self.image}, first in tensor {self.tensor}, written by "
            f"{self.op_type} {self.node}{size}, {where}"
        )


def find_not_finite(chain: Chain, step: str, pixels: NDArray[np.float32], image: str) -> NotFinite | None:
    """Return the first tensor of a step's own stage that is not finite, or None if it cannot be found out."""
    first = _find_first(chain, step, pixels)
    return first and first.model_copy(update={"step": step, "image": image})


def _find_first(chain: Chain, step: str, pixels: NDArray[np.float32]) -> NotFinite | None:
    if step == "approximation" and chain.model is not None:
        with patched(chain.model, chain.metadata.plan):
            return _first_in_torch(chain.model, pixels)
    if step == "engine":
        return first_in_engine(chain, pixels)
    proto = chain.portable if step == "export" and chain.portable is not None else chain.proto
    layers = layer_numbers(chain.model.module) if chain.model is not None else {}
    try:
        return first_in_onnx(proto, chain, pixels, layers)
    except InputFileError:
        return None


def first_in_engine(chain: Chain, pixels: NDArray[np.float32]) -> NotFinite | None:
    """Return the first of an engine's debug tensors that is not finite; None where it was built without, or all are finite."""
    if chain.engine is None or chain.engine.manifest.debug_tensors is None:
        return None
    blocks = {place.tensor: place.block for place in chain.engine.manifest.places}
    writers = {name: node for node in chain.proto.graph.node for name in node.output}
    since = None
    for name, array in inspect_engine(chain.engine, pixels).items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            node = writers.get(name)
            return NotFinite(
                step="engine", image="", tensor=name, node=node.name if node is not None else "of its own",
                op_type=node.op_type if node is not None else "a layer", block=blocks.get(name),
                count=int(np.count_nonzero(~np.isfinite(array))), since=since or "its input",
            )  # fmt: skip
        since = name
    return None


def first_in_onnx(
    model: ModelProto, chain: Chain, pixels: NDArray[np.float32], layers: dict[str, int]
) -> NotFinite | None:
    """Hand out a model's tensors in the graph's order, some at a time, until one is not finite.

    Args:
        model: functions and all; fp16 and bf16 files are rounded as they say.
        chain: says where external data lies.
        pixels: one image, `[1, 3, H, W]`.
        layers: block numbers by module path.
    """
    if has_low_types(model):
        plain = round_everywhere(model)
    else:
        plain = lower(model, "portable") if any(True for _ in fna_nodes(model.graph)) else model
    computed = [node for node in plain.graph.node if node.op_type != "Constant"]
    writers = {name: node for node in computed for name in node.output if name}
    names = [name for name in writers if not name.endswith(("/exact", "/low"))]
    for start in range(0, len(names), _TENSORS_AT_ONCE):
        some = names[start : start + _TENSORS_AT_ONCE]
        runner = OnnxRunner(mark_outputs(plain, some), chain.folder, chain.file.onnx.name, optimise=False)
        arrays = runner.run(pixels, some)
        for name in some:
            array = arrays[name]
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return _describe(plain, writers, name, array, chain, pixels, layers)
    return None


def _describe(
    model: ModelProto,
    writers: dict[str, NodeProto],
    name: str,
    array: NDArray[Any],
    chain: Chain,
    pixels: NDArray[np.float32],
    layers: dict[str, int],
) -> NotFinite:
    node = writers[name]
    if node.op_type == "Cast" and node.name == f"{name}/Cast" and f"{name}/exact" in writers:
        node = writers[f"{name}/exact"]
    inputs = [name for name in node.input if name in writers]
    largest = None
    if inputs:
        runner = OnnxRunner(mark_outputs(model, inputs), chain.folder, chain.file.onnx.name, optimise=False)
        values = runner.run(pixels, inputs).values()
        largest = max((float(np.abs(value).max()) for value in values if value.dtype.kind == "f"), default=None)
    return NotFinite(
        step="", image="", tensor=name, node=node.name, op_type=node.op_type, block=block_of(node, layers),
        count=int(np.count_nonzero(~np.isfinite(array))), largest_before=largest,
    )  # fmt: skip


def _first_in_torch(model: Any, pixels: NDArray[np.float32]) -> NotFinite | None:
    """The first module, in order of their end, that returns something that is not finite."""
    layers = layer_numbers(model.module)
    first: list[NotFinite] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, _args: Any, output: Any) -> None:
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(tensor, Tensor) and not first and not bool(torch.isfinite(tensor).all()):
                    block = next((number for path, number in layers.items() if f"{name}.".startswith(f"{path}.")), None)
                    count = int((~torch.isfinite(tensor)).sum())
                    kind = type(module).__name__
                    first.append(
                        NotFinite(step="", image="", tensor=name, node=name, op_type=kind, block=block, count=count)
                    )

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.module.named_modules()]
    try:
        run_torch(model, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return first[0] if first else None
