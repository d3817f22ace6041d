"""Exports of the zoo, made once per test run and shared by all tests and workers."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import surgery_zoo as zoo
import torch
from surgery_helpers import Export
from torch import nn

if importlib.util.find_spec("torchvision") is not None:
    # torchvision built for another torch cannot register its operators itself; transformers imports it where it is installed
    TORCHVISION = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        try:
            TORCHVISION.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            break


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of one run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "surgery_exports"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def export(exports: Path) -> Export:
    """Export a model once: `export(name, make, exporter="torchscript", opset=17, batch="dynamic")`."""

    def run(
        name: str,
        make: Callable[[], nn.Module],
        *,
        exporter: str = "torchscript",
        opset: int = 17,
        batch: str = "dynamic",
        sizes: str = "static",
        inputs: tuple[torch.Tensor, ...] = (torch.zeros(2, 3, zoo.IMAGE, zoo.IMAGE),),
    ) -> Path:
        path = exports / f"{name}-{exporter}-{opset}-{batch}-{sizes}.onnx"
        if path.exists():
            return path
        model = zoo.randomise(make())
        axes = {0: "batch"} if batch == "dynamic" else {}
        if sizes == "dynamic":
            axes |= {2: "height", 3: "width"}
        partial = path.with_suffix(f".{os.getpid()}.part")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = {
                "input_names": ["x", "x2"][: len(inputs)],
                "output_names": ["y"],
                "opset_version": opset,
                "verbose": False,
            }
            if exporter == "torchscript":
                dynamic = {"x": axes, "y": {0: "batch"}} if axes else None
                torch.onnx.export(model, inputs, str(partial), dynamo=False, dynamic_axes=dynamic, **arguments)
            else:
                shapes = (axes,) if axes else None
                torch.onnx.export(
                    model,
                    inputs,
                    str(partial),
                    dynamo=True,
                    external_data=False,
                    dynamic_shapes=shapes,
                    **arguments,
                )
        partial.replace(path)
        return path

    return run
