"""`fna inspect X.engine` tells a person what an engine is; `--json` has the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fna.cli import main
from fna.engines.look_inside.layers import FnaLayer
from fna.engines.manifest import Manifest, ShapeRange, write_manifest
from fna.export.preprocessing import Preprocessing
from fna.files import file_sha256
from fna.plan import BlockPlan, Plan


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "x.engine"
    path.write_bytes(b"not an engine")
    ranges = [
        ShapeRange(smallest=(1, 3, side, side), usual=(2, 3, side, side), largest=(8, 3, side, side))
        for side in (224, 518)
    ]
    manifest = Manifest(
        backend="tensorrt",
        backend_version="10.3.0",
        targets=("jetson-agx-orin",),
        compute_capabilities=(87,),
        onnx_name="x.onnx",
        onnx_sha256="0",
        engine_sha256=file_sha256(path),
        engine_bytes=44_100_000,
        lowering="plugin",
        plan=Plan(num_blocks=2, blocks=(BlockPlan(block=1, landmarks=64, sampler="grid"),)),
        precision="fp16",
        preprocessing=Preprocessing(),
        profiles={"pixel_values": ranges[0]},
        more_profiles=({"pixel_values": ranges[1]},),
        seconds=12.3,
        layers_with_fna=("/blocks.1/fna",),
        layers=(
            FnaLayer(
                name="/blocks.1/fna", op_type="FastNystromAttention", implementation="plugin", requested="fp16", precision="fp16",
            ),
        ),
        inspection="read from the engine",
        device="Orin",
        plugin_name="libfna_plugin.so",
        plugin_sha256="ab" * 32,
    )  # fmt: skip
    write_manifest(manifest, path)
    return path


def test_an_engine_is_described_in_words(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(engine)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for fact in (
        "x.engine, 44.1 MB",
        "TensorRT 10.3.0 in 12.3 s on Orin",
        "x.onnx, plugin lowering",
        "jetson-agx-orin (compute capability 8.7)",
        "fp16, TF32 off",
        "FNA blocks 1 of 2, S=64, grid, weighted",
        "libfna_plugin.so, SHA-256 abab",
        "pixel_values 1x3x224x224 to 8x3x224x224, tuned for 2x3x224x224",
        "pixel_values 1x3x518x518 to 8x3x518x518",
        "FNA layers (read from the engine)",
        "/blocks.1/fna",
    ):
        assert fact in said
    assert "{" not in said


def test_json_has_the_whole_manifest(engine: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main(["inspect", str(engine), "--json", str(report), "--quiet"]) == 0
    manifest = Manifest.model_validate_json(report.read_text())
    assert manifest.plugin_sha256 == json.loads(report.read_text())["plugin_sha256"] == "ab" * 32


def test_an_engine_without_its_manifest_is_refused(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine.with_name("x.engine.json").unlink()
    assert main(["inspect", str(engine)]) == 2
    assert "x.engine.json is missing" in capsys.readouterr().err
