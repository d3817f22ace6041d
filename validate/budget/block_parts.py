"""The places inside a model where steps are compared: per block, what FNA returns and the hidden states that leave the block."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fna.export.blocks import attention_block
from fna.patching import find_attention_blocks

SCOPES = "pkg.torch.onnx.name_scopes"
"""The node metadata in which PyTorch's exporter writes the modules that a node comes from."""

# As fna.export.trace, fna.export.surgery and fna.export.passes.lower name nodes.
_BLOCK_IN_NAME = re.compile(r"^/blocks\.(\d+)/|/fna_block_(\d+)(?:/|$)")


class BlockPart(NamedTuple):
    """A place in a model.

    Attributes:
        block: the attention block's number.
        part: `fna`, what the FNA operator returns, `[B, H, N, D]`; `output`, the hidden states that leave the block;
            `attention`, exact attention on the FNA operator's inputs, in a grafted file whose nodes are exact again.
    """

    block: int
    part: str

    def __str__(self) -> str:
        """Name the place for people."""
        names = {"fna": "FNA operator", "attention": "exact attention on its FNA operator's inputs"}
        return f"block {self.block}, {names.get(self.part, self.part)}"


@dataclass(frozen=True)
class AttentionCall:
    """The arguments and the result of one FNA operator in PyTorch."""

    query: Tensor
    key: Tensor
    value: Tensor
    landmarks: Tensor  # [B, S] or [1, S]
    landmark_bias: Tensor | None
    scale: float
    iterations: int
    exact_rows: bool
    out: Tensor
    key_mask: Tensor | None = None  # [B, N] or [1, N]
    sink: bool = False


@dataclass
class Capture:
    """What was seen in a run: arrays by place, and the FNA operators' calls in order."""

    arrays: dict[BlockPart, NDArray[np.float32]] = field(default_factory=dict)
    calls: list[AttentionCall] = field(default_factory=list)

    def clear(self) -> None:
        """Forget what was seen, before another run."""
        self.arrays.clear()
        self.calls.clear()


@contextmanager
def captured(model: nn.Module, fna_blocks: Sequence[int] = ()) -> Iterator[Capture]:
    """Record every run of a PyTorch model within the block.

    Args:
        model: whose attention blocks are watched.
        fna_blocks: the blocks that are FNA, in order; their operators are recorded as well.
    """
    capture = Capture()
    hooks = []
    for block in find_attention_blocks(model):
        hooks.append(block.layer.register_forward_hook(_recorder(capture, BlockPart(block.number, "output"))))
    try:
        if fna_blocks:
            with _CallRecorder(capture, fna_blocks):
                yield capture
        else:
            yield capture
    finally:
        for hook in hooks:
            hook.remove()


def _recorder(capture: Capture, part: BlockPart) -> Any:
    def record(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(tensor, Tensor):
            capture.arrays[part] = tensor.float().numpy()

    return record


class _CallRecorder(TorchDispatchMode):
    """Sees every operator that PyTorch runs, and keeps the calls of ours."""

    def __init__(self, capture: Capture, blocks: Sequence[int]) -> None:
        super().__init__()
        self.capture = capture
        self.blocks = blocks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.fna.attention.default, torch.ops.fna.attention_with_key_mask.default):
            number = self.blocks[len(self.capture.calls) % len(self.blocks)]
            mask, sink = None, False
            if func is torch.ops.fna.attention_with_key_mask.default:
                mask, sink = args[5], args[9]
                args = (*args[:5], *args[6:9])
            query, key, value, landmarks, bias, scale, iterations, exact_rows = args
            self.capture.calls.append(
                AttentionCall(
                    query, key, value, landmarks, bias, scale, iterations, exact_rows, result, key_mask=mask, sink=sink
                )
            )
            self.capture.arrays[BlockPart(number, "fna")] = result.float().numpy()
        return result


def find_block_parts(model: ModelProto, module: nn.Module) -> dict[BlockPart, str]:
    """Find the places in a traced file: tensor names by place, in the graph's order.

    A node says in its metadata which modules it comes from; a module's result is the last tensor written within it.
    Places that cannot be found, because a tool dropped the metadata, are left out.
    """
    found: dict[BlockPart, str] = {}
    wanted = {path: BlockPart(number, "output") for path, number in layer_numbers(module).items()}
    for node in model.graph.node:
        number = attention_block(node)
        if number is not None:
            found.pop(BlockPart(number, "fna"), None)
            found[BlockPart(number, "fna")] = node.output[0]
        for scope in _scopes(node):
            part = wanted.get(scope)
            if part is not None:
                found.pop(part, None)
                found[part] = node.output[0]
    order = {node.output[0]: index for index, node in enumerate(model.graph.node) if node.output}
    return dict(sorted(found.items(), key=lambda item: order[item[1]]))


def layer_numbers(module: nn.Module) -> dict[str, int]:
    """Return block numbers by the module path of each attention block's layer."""
    names = {id(child): name for name, child in module.named_modules()}
    return {names[id(block.layer)]: block.number for block in find_attention_blocks(module)}


def _scopes(node: NodeProto) -> list[str]:
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            try:
                scopes = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError):
                return []
            return [str(scope) for scope in scopes]
    return []


def block_of(node: NodeProto, layers: dict[str, int]) -> int | None:
    """Return the number of the block that a node belongs to, by its name or its scopes; None outside of blocks."""
    match = _BLOCK_IN_NAME.search(node.name)
    if match is not None:
        return int(match[1] or match[2])
    return next((layers[scope] for scope in _scopes(node) if scope in layers), None)
