"""Engines of the built-in model on a real GPU, against PyTorch and onnxruntime. `make test-gpu` runs these.

No GPU has run them so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange, BuildOptions
from fna.engines.device import find_gpu
from fna.engines.run.engine import Engine
from fna.engines.run.model import OnnxModel
from fna.engines.targets import TARGETS
from fna.export.preprocessing import bundled_photographs
from fna.export.sources.loading import LoadedModel, load_model
from fna.export.trace import TraceOptions, export_onnx
from fna.export.variants import FileVariant, make_variant
from fna.patching import patch, unpatch
from fna.plan import Plan, uniform_plan

GPU = find_gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason="this machine has no GPU")]

SIDE = 518
LAYERS = {"dense": "none", "FNA": "6-11"}
TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
"""Relative L2 error against PyTorch fp32 with the same plan; those of `fna validate`."""

Made = Callable[[str, str], Engine]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("dinov2-small-saliency")


@pytest.fixture(scope="module")
def pixels(model: LoadedModel) -> NDArray[np.float32]:
    return np.stack([model.preprocessing.apply(image, SIDE, SIDE) for _, image in bundled_photographs()])


def make_plan(model: LoadedModel, kind: str) -> Plan:
    return uniform_plan(model.num_blocks, layers=LAYERS[kind], landmarks=128)


@pytest.fixture(scope="module")
def made(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """An engine for this GPU by TensorRT-RTX, by kind and precision; built once."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")
    assert GPU is not None
    targets = tuple(
        target for target in TARGETS if GPU.capability in target.capabilities and "tensorrt-rtx" in target.flavours
    )
    if not targets:
        pytest.skip(f"TensorRT-RTX names no compute capability {GPU.capability / 10:.1f}")
    folder = tmp_path_factory.mktemp("engines")
    engines: dict[tuple[str, str], Engine] = {}

    def make(kind: str, precision: str) -> Engine:
        if (kind, precision) not in engines:
            path = folder / f"{kind}.onnx"
            if not path.exists():
                export_onnx(model, make_plan(model, kind), TraceOptions(SIDE, SIDE), path)
            if precision != "fp32":
                cast = folder / f"{kind}-{precision}.onnx"
                make_variant(path, cast, FileVariant(precision, check=False), [])
                path = cast
            options = BuildOptions(targets=targets[:1], batch=BatchRange(1, 1, 2))
            build_engine(path, path.with_suffix(".engine"), options)
            engines[kind, precision] = Engine(path.with_suffix(".engine"))
        return engines[kind, precision]

    yield make
    for engine in engines.values():
        engine.close()


def in_pytorch(model: LoadedModel, plan: Plan, pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    patch(model.module, plan)
    try:
        with torch.inference_mode():
            parts = [[tensor.numpy() for tensor in model.module(torch.from_numpy(image[None]))] for image in pixels]
    finally:
        unpatch(model.module)
    return {
        name: np.concatenate(arrays) for name, arrays in zip(model.output_names, zip(*parts, strict=True), strict=True)
    }


def relative_error(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("precision", list(TOLERANCE))
@pytest.mark.parametrize("kind", list(LAYERS))
def test_an_engine_gives_what_pytorch_gives(
    model: LoadedModel, made: Made, pixels: NDArray[np.float32], kind: str, precision: str
) -> None:
    wanted = in_pytorch(model, make_plan(model, kind), pixels)
    engine = made(kind, precision)
    found = [engine.run({"pixel_values": image[None]}) for image in pixels]
    for name, array in wanted.items():
        together = np.concatenate([outputs[name] for outputs in found])
        assert np.isfinite(together).all()
        assert relative_error(array, together) < TOLERANCE[precision], name


def test_an_engine_gives_what_its_onnx_file_gives(made: Made, pixels: NDArray[np.float32], tmp_path: Path) -> None:
    engine = made("FNA", "fp32")
    model = load_model("dinov2-small-saliency")
    export_onnx(model, make_plan(model, "FNA"), TraceOptions(SIDE, SIDE), tmp_path / "x.onnx")
    onnx_model = OnnxModel(tmp_path / "x.onnx")
    wanted, found = (runner.run({"pixel_values": pixels[:1]}) for runner in (onnx_model, engine))
    onnx_model.close()
    for name in wanted:
        assert relative_error(wanted[name], found[name]) < TOLERANCE["fp32"], name


def test_buffers_are_reused_without_mixing_runs_up(made: Made, pixels: NDArray[np.float32]) -> None:
    engine = made("FNA", "fp16")
    first = engine.run({"pixel_values": pixels[:1]})
    pair = engine.run({"pixel_values": pixels[:2]})
    again = engine.run({"pixel_values": pixels[:1]})
    for name, array in first.items():
        assert np.array_equal(array, again[name])
        assert relative_error(array, pair[name][:1]) < TOLERANCE["fp16"]


@pytest.mark.parametrize("kind", list(LAYERS))
def test_an_engine_is_timed_with_a_cuda_graph(made: Made, pixels: NDArray[np.float32], kind: str) -> None:
    latency = made(kind, "fp16").bench({"pixel_values": pixels[:1]}, runs=50)
    assert latency.cuda_graph
    assert 0 < latency.fastest <= latency.median <= latency.p99


def test_the_layers_of_an_engine_are_read_from_it(made: Made) -> None:
    manifest = made("FNA", "fp16").manifest
    assert manifest.inspection == "read from the engine"
    assert [layer.requested for layer in manifest.layers] == ["fp16"] * 6
