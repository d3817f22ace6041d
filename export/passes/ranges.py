"""Which values leave fp16's range on photographs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from fna.errors import InvalidArgumentError
from fna.export.blocks import find_blocks
from fna.export.metadata import read_metadata
from fna.export.passes.precision import FP16_LARGEST, norm_nodes
from fna.files import save_model
from fna.quiet import quiet_loggers
from fna.runtime import open_session


@dataclass(frozen=True)
class TensorRange:
    """The values that a tensor took on the photographs, and the block it belongs to; None outside all blocks."""

    tensor: str
    lowest: float
    highest: float
    block: int | None

    @property
    def largest(self) -> float:
        """The largest magnitude; NaN if there is one."""
        return float(np.max(np.abs([self.lowest, self.highest])))


def measure_ranges(
    model: ModelProto, pixels: Sequence[NDArray[np.float32]], name: str = "the file"
) -> list[TensorRange]:
    """Run an fp32 file on photographs and return the range of every tensor that a cast would make 16-bit.

    Norms, softmax and FNA's insides stay fp32, so their tensors are left out.

    Raises:
        InvalidArgumentError: if there are no photographs.
    """
    from onnxruntime.quantization.calibrate import MinMaxCalibrater

    if not pixels:
        raise InvalidArgumentError("ranges are measured on photographs, but there are none; give --images")
    blocks = find_blocks(model, read_metadata(model, name).plan.num_blocks)
    stays = norm_nodes(model)
    inside = {output for node in model.graph.node if node.name in stays for output in node.output}
    with tempfile.TemporaryDirectory() as folder, quiet_loggers(""):
        source = Path(folder) / "source.onnx"
        save_model(model, source)
        augmented = Path(folder) / "augmented.onnx"
        calibrater = MinMaxCalibrater(source, augmented_model_path=str(augmented))
        calibrater.augment_graph()
        # In an order of its own onnxruntime measures at the end, and holds every tensor till then: 22 GB at 5330 tokens.
        calibrater.infer_session = open_session(augmented, name=name, optimise=False, in_file_order=True)
        calibrater.collect_data(_Reader(_input_name(model), pixels))
        data = calibrater.compute_data()
    ranges = []
    for tensor, values in data.items():
        if tensor in inside:
            continue
        lowest, highest = (float(np.asarray(value).reshape(-1)[0]) for value in values.range_value)
        ranges.append(TensorRange(tensor, lowest, highest, blocks.get(tensor)))
    return ranges


def find_overflows(ranges: Sequence[TensorRange]) -> list[str]:
    """Say for each block whose values leave fp16's range, or come near, which tensor does and how far.

    Returns:
        One line per block, ascending; empty where all fits.
    """
    worst: dict[int | None, TensorRange] = {}
    for measured in ranges:
        known = worst.get(measured.block)
        if not measured.largest <= FP16_LARGEST and (known is None or not measured.largest <= known.largest):
            worst[measured.block] = measured
    lines = []
    for block in sorted(worst, key=lambda number: -1 if number is None else number):
        measured = worst[block]
        where = "outside the blocks" if block is None else f"block {block}"
        mend = "" if block is None else f"; keep it with --keep-fp32 {block}"
        lines.append(
            f"{where}: {measured.tensor} reaches {measured.largest:.3g}, beyond fp16's {FP16_LARGEST:.0f}{mend}"
        )
    return lines


class _Reader:
    """Hands photographs to ONNX Runtime's calibraters, one at a time."""

    def __init__(self, name: str, pixels: Sequence[NDArray[np.float32]]) -> None:
        self._name, self._pixels = name, pixels
        self._waiting: Iterator[NDArray[np.float32]] = iter(pixels)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next photograph by input name, or None after the last."""
        image = next(self._waiting, None)
        return None if image is None else {self._name: image}

    def rewind(self) -> None:
        """Start again."""
        self._waiting = iter(self._pixels)


def _input_name(model: ModelProto) -> str:
    constant = {tensor.name for tensor in model.graph.initializer}
    return next(str(value.name) for value in model.graph.input if value.name not in constant)
