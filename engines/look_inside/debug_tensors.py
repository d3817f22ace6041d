"""Looking inside an engine: tensors that are marked when it is built, and handed out one by one while it runs.

`blocks` marks the block boundaries by name; a marked tensor is written to memory, so nothing is fused across it. `unfused` marks what
fusion left over and costs no fusion, but the engine then knows most tensors by names of its own only. Neither changes the
engine's inputs and outputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import BaseModel, ConfigDict

from fna.errors import BuildError, InvalidArgumentError, MissingCapabilityError
from fna.export.blocks import attention_block, block_ends
from fna.export.operators.record import DOMAIN
from fna.export.operators.registry import OPERATORS
from fna.plan import Plan

DebugTensors = Literal["blocks", "unfused"]

# By the names of TensorRT's types; numpy has no name for some.
_TYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "UINT8": np.uint8,
}


class Place(BaseModel):
    """A place in a model where results are compared.

    Attributes:
        block: the attention block's number.
        part: `fna`, what the FNA operator returns, `[B, H, N, D]`; `output`, the hidden states that leave the block.
        tensor: its name in the ONNX file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: int
    part: Literal["fna", "output"]
    tensor: str


def find_places(model: ModelProto, plan: Plan) -> tuple[Place, ...]:
    """Return the output of each FNA operator and of each block, in the graph's order, as far as they can be told apart.

    Args:
        model: as `fna export` or `fna graft` wrote it, or lowered, or in another precision.
        plan: the file's.
    """
    outputs: dict[tuple[int, str], str] = {}
    for node in model.graph.node:
        number = attention_block(node)
        if number is not None and (node.domain != DOMAIN or OPERATORS[node.op_type].attends):
            outputs[number, "fna"] = node.output[0]
    try:
        ends = block_ends(model, plan.num_blocks)
    except InvalidArgumentError:  # a lowered file, whose FNA is more than one softmax
        ends = {}
    outputs.update({(block, "output"): tensor for block, tensor in ends.items()})
    order = {name: index for index, node in enumerate(model.graph.node) for name in node.output}
    return tuple(
        Place(block=block, part=part, tensor=tensor)  # type: ignore[arg-type]
        for (block, part), tensor in sorted(outputs.items(), key=lambda output: order[output[1]])
    )


def mark_debug_tensors(
    title: str, network: Any, kind: DebugTensors, places: Sequence[Place], protected: Sequence[str] = ()
) -> tuple[Place, ...]:
    """Mark tensors of a parsed network, before it is built.

    Args:
        title: the flavour's, for errors.
        network: TensorRT's network definition.
        kind: what to mark.
        places: the block boundaries, from `find_places`.
        protected: names of the network's outputs, which need no mark.

    Returns:
        The places that the network has; of `unfused` all, since what fusion leaves over shows when the engine runs.

    Raises:
        MissingCapabilityError: for `unfused` where this version of TensorRT has no such thing.
        BuildError: if no place is a tensor of the network, or TensorRT refuses a mark.
    """
    if kind == "unfused":
        mark_unfused = getattr(network, "mark_unfused_tensors_as_debug_tensors", None)
        if mark_unfused is None:
            raise MissingCapabilityError(
                f"this version of {title} has no mark for the tensors that fusion leaves over; ask for --debug-tensors blocks, or "
                "build with a later one"
            )
        if not mark_unfused():
            raise BuildError(f"{title} did not mark its unfused tensors; ask for --debug-tensors blocks")
        return tuple(places)
    tensors: dict[str, Any] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for number in range(layer.num_outputs):
            tensor = layer.get_output(number)
            if tensor is not None:
                tensors[tensor.name] = tensor
    marked = [place for place in places if place.tensor in tensors and place.tensor not in protected]
    for place in marked:
        if not network.mark_debug(tensors[place.tensor]):
            raise BuildError(
                f"{title} did not mark {place.tensor} (block {place.block}); build without --debug-tensors"
            )
    if not marked:
        raise BuildError(
            f"none of the {len(places)} block boundaries of the file is a tensor of {title}'s network, so there is nothing to "
            "mark; build from the file that fna export or fna graft wrote, not from a lowered one"
        )
    return tuple(marked)


def set_debug_state(context: Any, kind: DebugTensors, on: bool) -> None:
    """Have an execution context hand its debug tensors to its listener, or not."""
    context.set_all_tensors_debug_state(on)
    if kind == "unfused":
        context.unfused_tensors_debug_state = on


def make_listener(trt: Any) -> Any:
    """Return a listener that copies each debug tensor to the host, as fp32 where it holds floating-point numbers.

    Its `arrays` hold them by name, in the order in which the engine wrote them, and its `problems` what could not be copied.
    Polygraphy's own listener does the same, except for bf16.
    """

    class Listener(trt.IDebugListener):
        def __init__(self) -> None:
            trt.IDebugListener.__init__(self)
            self.arrays: dict[str, NDArray[Any]] = {}
            self.problems: list[str] = []

        def process_debug_tensor(self, addr: int, location: Any, type: Any, shape: Any, name: str, stream: int) -> bool:
            try:  # TensorRT, which calls this, knows nothing of Python's exceptions
                self.arrays[name] = _copy_to_host(addr, str(location), str(type), tuple(shape), stream)
            except Exception as error:
                self.problems.append(f"{name}: {error}")
                return False
            return True

    return Listener()


def _copy_to_host(address: int, location: str, kind: str, shape: tuple[int, ...], stream: int) -> NDArray[Any]:
    """Copy while the callback lasts; afterwards the memory may hold something else."""
    name = kind.rsplit(".", 1)[-1]
    if name not in _TYPES:
        raise InvalidArgumentError(f"tensors of type {name} cannot be read")
    array = np.empty(shape, dtype=_TYPES[name])
    if array.nbytes:
        if location.endswith("HOST"):
            ctypes.memmove(array.ctypes.data, address, array.nbytes)
        else:
            _copy_from_device(array, address, stream)
    return array.astype(np.float32) if array.dtype.kind == "f" or name == "BF16" else array


def _copy_from_device(array: NDArray[Any], address: int, stream: int) -> None:
    from polygraphy import cuda

    library = cuda.wrapper()
    library.memcpy(array.ctypes.data, address, array.nbytes, cuda.MemcpyKind.DeviceToHost, stream)
    library.stream_synchronize(stream)


def how_to_build(onnx_name: str, engine_name: str) -> str:
    """Say how an engine is built so that it can be looked into."""
    return (
        f"build it again with its other options and --debug-tensors blocks: fna build {onnx_name} -o {engine_name} "
        "--debug-tensors blocks"
    )
