"""Engines from the real TensorRT-RTX builder, on a machine that needs no GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from fna.cli import main
from fna.engines.build import BatchRange, build_rtx_engine, parse_batch
from fna.engines.manifest import manifest_path, read_manifest
from fna.engines.run import check_engine_can_run
from fna.engines.targets import find_targets
from fna.errors import BuildError, InputFileError, InvalidArgumentError, MissingCapabilityError
from fna.export.files import file_sha256, load_onnx
from fna.export.functions import ATTENTION, DOMAIN, FARTHEST_POINTS, NORM_GRID, PLUGIN_FIELDS, attach_functions
from fna.export.metadata import FileMetadata, write_metadata
from fna.plan import BlockPlan, Plan

needs_rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")


def write_model(path: Path, *, sampler: str = FARTHEST_POINTS, extra: str | None = None) -> Path:
    """A file with one FNA block over the patches of 32-pixel images, as small as an engine can be."""
    torch.manual_seed(0)
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 32, 32])
    tokens = helper.make_tensor_value_info("tokens", TensorProto.FLOAT, None)
    constants = {
        "kernel": torch.randn(32, 3, 4, 4).numpy(),
        "shape": torch.tensor([0, 2, 16, 64]).numpy(),
        "bias": torch.zeros(1, 8).numpy(),
        "hidden_shape": torch.tensor([0, 64, 32]).numpy(),
    }
    settings = {"num_landmarks": 8} | (PLUGIN_FIELDS if sampler == FARTHEST_POINTS else {"prefix_tokens": 1})
    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernel"], ["patches"], strides=[4, 4], name="patches"),
        helper.make_node("Reshape", ["patches", "shape"], ["flat"], name="flatten"),
        helper.make_node("Transpose", ["flat"], ["heads"], perm=[0, 1, 3, 2], name="heads"),
        helper.make_node("Reshape", ["heads", "hidden_shape"], ["hidden"], name="hidden"),
        helper.make_node(sampler, ["hidden"], ["landmarks"], name="/blocks.0/sampler", domain=DOMAIN, **settings),
        helper.make_node(
            ATTENTION, ["heads", "heads", "heads", "landmarks", "bias"], ["mixed"], name="/blocks.0/fna", domain=DOMAIN,
            scale=0.25, iterations=6, exact_rows=1, **PLUGIN_FIELDS,
        ),
        helper.make_node(extra or "Relu", ["mixed"], ["tokens"], name="last"),
    ]  # fmt: skip
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", [pixels], [tokens], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    attach_functions(model, TensorProto.FLOAT)
    plan = Plan(num_blocks=1, blocks=(BlockPlan(block=0, landmarks=8, sampler="fps"),), prefix_tokens=0)
    write_metadata(model, FileMetadata(plan=plan, source="tiny", origin="trace", height=32, width=32, patch_size=4))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    engine = folder / "tiny.engine"
    build_rtx_engine(write_model(folder / "tiny.onnx"), engine, find_targets("all"), BatchRange(1, 2, 4))
    return engine


def test_the_engine_and_its_manifest_are_written(built: Path) -> None:
    manifest = read_manifest(built)
    assert built.stat().st_size == manifest.engine_bytes > 0
    assert manifest.backend_version == needs_rtx.__version__
    assert manifest.onnx_sha256 == file_sha256(built.parent / "tiny.onnx")
    assert manifest.compute_capabilities == (80, 86, 89, 120)
    assert manifest.lowering == "portable"
    assert manifest.layers_with_fna == ("/blocks.0/sampler", "/blocks.0/fna")
    shapes = manifest.profiles["pixel_values"]
    assert (shapes.smallest, shapes.usual, shapes.largest) == ((1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))
    assert sorted(path.name for path in built.parent.iterdir()) == ["tiny.engine", "tiny.engine.json", "tiny.onnx"]


def test_norm_grid_landmarks_build_too(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx", sampler=NORM_GRID)
    manifest = build_rtx_engine(path, tmp_path / "tiny.engine", find_targets("rtx-ada"), BatchRange(1, 1, 1))
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
        build_rtx_engine(path, tmp_path / "tiny.engine", find_targets("rtx-ada"), BatchRange(1, 1, 1))
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
        build_rtx_engine(path, tmp_path / "tiny.engine", find_targets("rtx-ada"), BatchRange(1, 1, 1))


@pytest.mark.parametrize(("text", "range_"), [("1", (1, 1, 1)), ("1:4", (1, 4, 4)), ("1:4:8", (1, 4, 8))])
def test_batch_ranges(text: str, range_: tuple[int, int, int]) -> None:
    assert parse_batch(text) == BatchRange(*range_)


@pytest.mark.parametrize("text", ["0", "4:1", "1:2:3:4", "a", "", "1:"])
def test_batch_ranges_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="batch"):
        parse_batch(text)
