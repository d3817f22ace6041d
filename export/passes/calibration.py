"""What enters each linear layer on calibration photographs: ranges and means per channel, and a sample of rows."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from fna.errors import InvalidArgumentError
from fna.export.operators.builder import Builder
from fna.export.operators.registry import model_opset
from fna.export.passes.lower import lower
from fna.files import LARGEST_SINGLE_FILE
from fna.runtime import open_session, run_session


@dataclass(frozen=True)
class InputStatistics:
    """What a tensor `[..., K]` held on the photographs.

    Attributes:
        lowest: of each photograph and channel, `[P, K]`, on all of its views.
        highest: likewise.
        mean: per channel, `[K]`.
        rows: evenly spaced rows of each photograph's views, `[P, R, K]`.
    """

    lowest: NDArray[np.float64]
    highest: NDArray[np.float64]
    mean: NDArray[np.float64]
    rows: NDArray[np.float32]


def measure_inputs(
    model: ModelProto,
    channels: Mapping[str, int],
    pixels: Sequence[NDArray[np.float32]],
    rows: int,
    name: str = "the file",
) -> dict[str, InputStatistics]:
    """Run an fp32 file on photographs and return what tensors of it held.

    Args:
        model: with its functions and tensors.
        channels: the tensors, with the size K of their last axis.
        pixels: preprocessed photographs, `[V, 3, H, W]` each: one view, or several, as many of each.
        rows: how many of each tensor are kept, of all photographs together.
        name: says in errors which file it was.

    Raises:
        InvalidArgumentError: if a tensor holds NaN or infinite values, naming it and the photograph's number.
    """
    observed = lower(model, "onnxruntime")  # scores of all heads at once are gigabytes at 5330 tokens
    op = Builder(model_opset(model), prefix="fna_observed/")
    places = np.arange(-(-rows // sum(len(views) for views in pixels)), dtype=np.int64)
    results: dict[str, tuple[str, ...]] = {}
    for tensor, size in channels.items():
        flat = op.Reshape(tensor, [-1, size])
        count = op.Gather(op.Shape(flat), [0])
        results[tensor] = (
            op.ReduceMin(flat, axes=[0], keepdims=0),
            op.ReduceMax(flat, axes=[0], keepdims=0),
            op.ReduceMean(flat, axes=[0], keepdims=0),
            op.Gather(flat, op.Div(op.Mul(places, count), [len(places)]), axis=0),
        )
    observed.graph.node.extend(op.nodes)
    del observed.graph.output[:]
    for kept in results.values():
        observed.graph.output.extend(helper.make_tensor_value_info(value, TensorProto.FLOAT, None) for value in kept)
    seen: dict[str, list[tuple[NDArray[np.float32], ...]]] = {tensor: [] for tensor in channels}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "observed.onnx"
        onnx.save(observed, path, save_as_external_data=observed.ByteSize() > LARGEST_SINGLE_FILE)
        session = open_session(path, name=name)
        for number, views in enumerate(pixels):
            arrays = [run_session(session, {session.get_inputs()[0].name: view[None]}, name=name) for view in views]
            for tensor, kept in results.items():
                found = [tuple(of_view[value] for value in kept) for of_view in arrays]
                if not all(np.isfinite(array).all() for arrays_of_view in found for array in arrays_of_view):
                    raise InvalidArgumentError(
                        f"{tensor} of {name} holds NaN or infinite values on photograph {number + 1} of {len(pixels)}, so it "
                        "has no range to quantise by; mend the fp32 model first (fna validate names its first such tensor)"
                    )
                lowest, highest, mean, sample = zip(*found, strict=True)
                merged = np.min(lowest, axis=0), np.max(highest, axis=0), np.mean(mean, axis=0), np.concatenate(sample)
                seen[tensor].append(merged)
    return {tensor: _summary(found) for tensor, found in seen.items()}


def _summary(found: Sequence[tuple[NDArray[np.float32], ...]]) -> InputStatistics:
    lowest, highest, mean, rows = (np.stack(parts) for parts in zip(*found, strict=True))
    return InputStatistics(
        lowest.astype(np.float64), highest.astype(np.float64), mean.mean(axis=0, dtype=np.float64), rows
    )
