"""The places inside a model where steps are compared: per block, what FNA returns and the hidden states that leave the block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from torch import Tensor, nn

from fna.export.blocks import attention_block, block_of_name, module_scopes
from fna.observing import ReplacedCall, observed
from fna.patching import find_attention_blocks, is_patched


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


@dataclass
class Capture:
    """What was seen in a run: arrays by place, and the FNA operators' calls in order."""

    arrays: dict[BlockPart, NDArray[np.float32]] = field(default_factory=dict)
    calls: list[ReplacedCall] = field(default_factory=list)


@contextmanager
def captured(model: nn.Module) -> Iterator[Capture]:
    """Record every run of a PyTorch model within the context; of a patched one the FNA operators as well."""
    capture = Capture()

    def leaving(block: int, hidden: Tensor) -> None:
        capture.arrays[BlockPart(block, "output")] = hidden.float().numpy()

    def replaced(call: ReplacedCall) -> None:
        capture.calls.append(call)
        capture.arrays[BlockPart(call.block, "fna")] = call.out.float().numpy()

    with observed(model, leaving=leaving, replaced=replaced if is_patched(model) else None):
        yield capture


def find_block_parts(model: ModelProto, module: nn.Module) -> dict[BlockPart, str]:
    """Find the places in a traced file: tensor names by place, in the graph's order.

    A node says in its metadata which modules it comes from; a module's result is the last tensor written within it.
    Places that cannot be found, because a tool dropped the metadata, are left out.
    """
    tensors: dict[BlockPart, str] = {}
    wanted = {path: BlockPart(number, "output") for path, number in layer_numbers(module).items()}
    for node in model.graph.node:
        number = attention_block(node)
        if number is not None:
            tensors.pop(BlockPart(number, "fna"), None)
            tensors[BlockPart(number, "fna")] = node.output[0]
        for scope in module_scopes(node):
            part = wanted.get(scope)
            if part is not None:
                tensors.pop(part, None)
                tensors[part] = node.output[0]
    order = {node.output[0]: index for index, node in enumerate(model.graph.node) if node.output}
    return dict(sorted(tensors.items(), key=lambda part: order[part[1]]))


def layer_numbers(module: nn.Module) -> dict[str, int]:
    """Return block numbers by the module path of each attention block's layer."""
    names = {id(child): name for name, child in module.named_modules()}
    return {names[id(block.layer)]: block.number for block in find_attention_blocks(module)}


def block_of(node: NodeProto, layers: dict[str, int]) -> int | None:
    """Return the number of the block that a node belongs to, by its name or its scopes; None outside of blocks."""
    number = block_of_name(node.name)
    if number is not None:
        return number
    return next((layers[scope] for scope in module_scopes(node) if scope in layers), None)
