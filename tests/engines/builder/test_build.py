"""Engines from the real TensorRT-RTX builder, on a machine that needs no GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from tiny_engines import write_model

from fna.cli import main
from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange, BuildOptions, parse_batch
from fna.engines.manifest import manifest_path, read_manifest
from fna.engines.run.requirements import check_engine_can_run
from fna.engines.targets import find_targets
from fna.errors import BuildError, InputFileError, InvalidArgumentError, MissingCapabilityError
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.norm_grid_landmarks import NORM_GRID_LANDMARKS
from fna.export.operators.registry import fna_nodes
from fna.files import file_sha256, load_onnx

needs_rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    engine = folder / "tiny.engine"
    build_engine(
        write_model(folder / "tiny.onnx"), engine, BuildOptions(targets=find_targets("all"), batch=BatchRange(1, 2, 4))
    )
    return engine


def test_the_engine_and_its_manifest_are_written(built: Path) -> None:
    manifest = read_manifest(built)
    assert built.stat().st_size == manifest.engine_bytes > 0
    assert manifest.backend_version == needs_rtx.__version__
    assert manifest.onnx_sha256 == file_sha256(built.parent / "tiny.onnx")
    assert manifest.compute_capabilities == (80, 86, 89, 120)
    assert manifest.lowering == "fused"
    assert manifest.layers_with_fna == ("/blocks.0/sampler", "/blocks.0/fna")
    shapes = manifest.profiles["pixel_values"]
    assert (shapes.smallest, shapes.usual, shapes.largest) == ((1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))
    assert sorted(path.name for path in built.parent.iterdir()) == ["tiny.engine", "tiny.engine.json", "tiny.onnx"]


def test_where_the_builder_refuses_the_fused_form_the_portable_one_is_built_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorRT-RTX 1.7.1 does where an FNA node's queries are its keys."""
    path, engine = write_model(tmp_path / "tiny.onnx"), tmp_path / "tiny.engine"
    model = load_onnx(path)
    node = next(node for node in fna_nodes(model.graph) if FAST_NYSTROM_ATTENTION.is_called_by(node))
    node.input[1] = node.input[0]
    onnx.save(model, path)
    assert main(["build", str(path), "-o", str(engine), "--target", "rtx-ada", "--lowering", "fused"]) == 2
    assert "build with --lowering portable" in " ".join(capsys.readouterr().err.split())
    assert not engine.exists()
    assert main(["build", str(path), "-o", str(engine), "--target", "rtx-ada"]) == 0
    assert "note: portable instead of fused: TensorRT-RTX could not build the engine" in " ".join(
        capsys.readouterr().out.split()
    )
    manifest = read_manifest(engine)
    assert manifest.lowering == "portable"
    assert "Myelin" in manifest.not_fused


def test_norm_grid_landmarks_build_too(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx", sampler=NORM_GRID_LANDMARKS)
    manifest = build_engine(
        path, tmp_path / "tiny.engine", BuildOptions(targets=find_targets("rtx-ada"), batch=BatchRange(1, 1, 1))
    )
    assert manifest.compute_capabilities == (89,)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so the engine may run")
def test_without_a_gpu_the_engine_is_refused_by_exit_code_3(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingCapabilityError, match="needs an NVIDIA GPU") as caught:
        check_engine_can_run(built)
    assert caught.value.exit_code == 3
    assert main(["run", str(built)]) == 3
    message = capsys.readouterr().err
    assert message.startswith("fna: tiny.engine needs an NVIDIA GPU of compute capability 8.0, 8.6, 8.9, 12.0")
    assert message.count("\n") == 1


def test_a_node_that_the_parser_refuses_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx", extra="Det")
    with pytest.raises(BuildError, match=r"node last \(Det\)"):
        build_engine(
            path, tmp_path / "tiny.engine", BuildOptions(targets=find_targets("rtx-ada"), batch=BatchRange(1, 1, 1))
        )
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.onnx"]


def test_a_tampered_engine_is_refused(built: Path, tmp_path: Path) -> None:
    engine = tmp_path / "tiny.engine"
    engine.write_bytes(built.read_bytes()[:-1] + b"x")
    manifest_path(engine).write_bytes(manifest_path(built).read_bytes())
    with pytest.raises(InputFileError, match="SHA-256 differs"):
        read_manifest(engine)


@pytest.mark.parametrize(
    ("manifest", "said"),
    [(None, "is missing"), ("{}", "backend"), ("not json", "Invalid JSON")],
    ids=["none", "empty", "text"],
)
def test_an_engine_without_its_manifest_is_refused(tmp_path: Path, manifest: str | None, said: str) -> None:
    engine = tmp_path / "x.engine"
    engine.write_bytes(b"engine")
    if manifest is not None:
        manifest_path(engine).write_text(manifest)
    with pytest.raises(InputFileError, match=said):
        read_manifest(engine)


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx")
    model = load_onnx(path)
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputFileError, match="no fna metadata"):
        build_engine(
            path, tmp_path / "tiny.engine", BuildOptions(targets=find_targets("rtx-ada"), batch=BatchRange(1, 1, 1))
        )


@pytest.mark.parametrize(("text", "range_"), [("1", (1, 1, 1)), ("1:4", (1, 4, 4)), ("1:4:8", (1, 4, 8))])
def test_batch_ranges(text: str, range_: tuple[int, int, int]) -> None:
    assert parse_batch(text) == BatchRange(*range_)


@pytest.mark.parametrize("text", ["0", "4:1", "1:2:3:4", "a", "", "1:"])
def test_batch_ranges_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="batch"):
        parse_batch(text)
