"""Running files, and what is refused before an engine is deserialised."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto
from tiny_engines import write_model
from tiny_files import SIDE

from fna.cli import main
from fna.engines.device import Gpu
from fna.engines.lowerings import ProcessorForm
from fna.engines.manifest import Manifest, ShapeRange, manifest_path, write_manifest
from fna.engines.run import engine as run
from fna.engines.run import model as model_module
from fna.engines.run import requirements
from fna.engines.run.model import OnnxModel
from fna.engines.run.requirements import check_engine_can_run
from fna.errors import InputFileError, MissingCapabilityError
from fna.export.passes.precision import cast_model
from fna.export.preprocessing import Preprocessing
from fna.files import file_sha256, load_onnx, save_model
from fna.plan import Plan
from fna.runtime import Provider, open_session, run_session

Find = Callable[[str], Path]


def ada(capability: int = 89) -> Gpu:
    return Gpu("GPU", capability, 24 * 2**30, 128, "13.0")


class FakeModule:
    __version__ = "10.3.0"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bytes that are no engine, with a manifest; a machine that has what it needs."""
    path = tmp_path / "x.engine"
    path.write_bytes(b"not an engine")
    monkeypatch.setattr(requirements, "find_gpu", ada)
    monkeypatch.setattr(requirements, "import_flavour", lambda _name: FakeModule)
    rewrite(path)
    return path


def rewrite(engine: Path, **changes: object) -> None:
    shape = (1, 3, 32, 32)
    manifest = Manifest(
        backend="tensorrt",
        backend_version="10.3.0",
        targets=("rtx-ada",),
        compute_capabilities=(89,),
        onnx_name="x.onnx",
        onnx_sha256="0",
        engine_sha256=file_sha256(engine),
        engine_bytes=engine.stat().st_size,
        lowering="plugin",
        plan=Plan(num_blocks=1),
        precision="fp16",
        preprocessing=Preprocessing(),
        profiles={"pixel_values": ShapeRange(smallest=shape, usual=shape, largest=shape)},
        seconds=1.0,
        layers_with_fna=(),
    )
    write_manifest(manifest.model_copy(update=changes), engine)


def test_an_engine_that_fits_is_not_refused(engine: Path) -> None:
    assert check_engine_can_run(engine).backend_version == "10.3.0"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"backend_version": "10.13.3"},
            r"built by TensorRT 10\.13\.3, but 10\.3\.0 is installed.*build it again here",
        ),
        ({"backend_version": "10.4.0", "version_compatible": True}, "10.4.0, but 10.3.0"),
        ({"backend_version": "8.6.1", "version_compatible": True}, "8.6.1, but 10.3.0"),
        ({"compute_capabilities": (80, 86)}, r"compute capability 8\.0, 8\.6, but this GPU has 8\.9.*--target"),
        ({"plugin_name": "libfna_plugin.so", "plugin_sha256": "0"}, r"needs the plugin .*fna plugin"),
    ],
    ids=["version", "older", "major", "capability", "plugin"],
)
def test_what_does_not_fit_is_refused_with_what_to_do(
    engine: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    rewrite(engine, **changes)
    with pytest.raises(MissingCapabilityError, match=said) as caught:
        check_engine_can_run(engine, tmp_path / "nowhere.so")
    assert caught.value.exit_code == 3


def test_another_plugin_than_the_engine_was_built_with_is_refused(engine: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "libfna_plugin.so"
    plugin.write_bytes(b"other")
    rewrite(engine, plugin_name="libfna_plugin.so", plugin_sha256="0")
    with pytest.raises(MissingCapabilityError, match="another libfna_plugin.so"):
        check_engine_can_run(engine, plugin)
    rewrite(engine, plugin_name="libfna_plugin.so", plugin_sha256=file_sha256(plugin))
    check_engine_can_run(engine, plugin)


@pytest.mark.parametrize(
    "changes",
    [
        {"backend_version": "10.1.0", "version_compatible": True},
        {"compute_capabilities": (80,), "hardware_compatible": True},
    ],
    ids=["version", "hardware"],
)
def test_compatible_engines_run_elsewhere_too(engine: Path, changes: dict[str, object]) -> None:
    rewrite(engine, **changes)
    check_engine_can_run(engine)


def test_hardware_compatibility_begins_with_ampere(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(engine, compute_capabilities=(80,), hardware_compatible=True)
    monkeypatch.setattr(requirements, "find_gpu", lambda: ada(75))
    with pytest.raises(MissingCapabilityError, match="has 7.5"):
        check_engine_can_run(engine)


@pytest.mark.parametrize("size", [5, 0], ids=["truncated", "empty"])
def test_a_truncated_engine_is_refused_before_anything_else(engine: Path, size: int) -> None:
    engine.write_bytes(engine.read_bytes()[:size])
    with pytest.raises(InputFileError, match="SHA-256 differs"):
        check_engine_can_run(engine)


def test_a_manifest_of_another_flavour_than_there_is_is_refused(engine: Path) -> None:
    text = manifest_path(engine).read_text().replace('"tensorrt"', '"openvino"')
    manifest_path(engine).write_text(text)
    with pytest.raises(InputFileError, match="backend"):
        check_engine_can_run(engine)


def test_an_opened_file_is_given_the_form_of_onnxruntime_and_gives_what_the_file_gives(
    tiny_file: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ModelProto] = []
    monkeypatch.setattr(
        model_module, "open_session", lambda model, **k: asked.append(model) or open_session(model, **k)
    )
    pixels = np.random.default_rng(0).standard_normal((2, 3, SIDE, SIDE), dtype=np.float32)
    wanted = run_session(open_session(tiny_file("traced")), {"pixel_values": pixels})
    model = OnnxModel(tiny_file("traced"))
    found = model.run({"pixel_values": pixels})
    model.close()
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=2e-5)
    assert "MultiHeadAttention" in {node.op_type for node in asked[0].graph.node}


@pytest.mark.parametrize(("provider", "form"), [("cpu", "onnxruntime-kernels"), ("cuda", "onnxruntime")])
def test_a_processor_is_given_a_form_of_its_own(
    provider: Provider, form: str, tiny_file: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    given: list[Path | None] = []
    monkeypatch.setattr(model_module, "lower", lambda model, lowering: asked.append(lowering) or model)
    monkeypatch.setattr(model_module, "open_session", lambda model, **settings: given.append(settings["operators"]))
    OnnxModel(tiny_file("traced"), provider=provider)
    assert asked == [form]
    assert [library is not None for library in given] == [form == "onnxruntime-kernels"]


def test_without_a_compiler_a_processor_is_given_standard_operators(
    tiny_file: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "processor_form", lambda: ProcessorForm("onnxruntime-cpu", None))
    pixels = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), dtype=np.float32)
    found = OnnxModel(tiny_file("traced")).run({"pixel_values": pixels})
    monkeypatch.undo()
    for name, array in OnnxModel(tiny_file("traced")).run({"pixel_values": pixels}).items():
        np.testing.assert_allclose(found[name], array, atol=2e-5)


def test_a_file_of_another_project_is_opened_as_it_is(tiny_file: Find, tmp_path: Path) -> None:
    model = load_onnx(tiny_file("traced"))
    del model.metadata_props[:]
    save_model(model, tmp_path / "other.onnx")
    pixels = np.zeros((1, 3, SIDE, SIDE), np.float32)
    assert OnnxModel(tmp_path / "other.onnx").run({"pixel_values": pixels}).keys() == {
        value.name for value in model.graph.output
    }


def test_inputs_are_cast_to_the_files_types(tiny_file: Find, tmp_path: Path) -> None:
    save_model(cast_model(load_onnx(tiny_file("traced")), "fp16", keep_io=False), tmp_path / "half.onnx")
    pixels = np.zeros((1, 3, SIDE, SIDE), np.float32)
    outputs = run_session(open_session(tmp_path / "half.onnx"), {"pixel_values": pixels})
    assert {array.dtype for array in outputs.values()} == {np.dtype(np.float16)}


def test_a_bench_gives_median_p99_and_throughput(
    tiny_file: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "latency.json"
    assert main(["run", str(tiny_file("traced")), "--bench", "9", "--batch", "2", "--json", str(report)]) == 0
    latency = json.loads(report.read_text())["latency"]
    assert latency["fastest"] <= latency["median"] <= latency["p99"] <= latency["slowest"]
    assert (latency["runs"], latency["batch"], latency["cuda_graph"]) == (9, 2, False)
    assert 0 < latency["throughput"] <= 2 / latency["fastest"] * 1e3
    assert "images/s, batch 2, 9 runs (the call, on the processor)" in capsys.readouterr().out


def test_the_cuda_provider_is_refused_where_there_is_none(tiny_file: Find, capsys: pytest.CaptureFixture[str]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    assert main(["run", str(tiny_file("traced")), "--provider", "cuda"]) == 3
    assert "no CUDAExecutionProvider; install it with: pip install 'fna[gpu]'" in capsys.readouterr().err


def test_a_file_of_open_size_asks_for_one(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx")
    model = load_onnx(path)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].ClearField("dim_value")
    path.write_bytes(model.SerializeToString())
    assert main(["run", str(path)]) == 2


def test_another_resolution_than_the_files_own_is_refused(tiny_file: Find, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tiny_file("traced")), "--resolution", f"{SIDE}x{SIDE}"]) == 0
    assert main(["run", str(tiny_file("traced")), "--resolution", str(2 * SIDE)]) == 2
    said = capsys.readouterr().err
    assert f"takes {SIDE}x{SIDE} images only, but --resolution asks for {2 * SIDE}x{2 * SIDE}" in said


@pytest.mark.parametrize("options", [["--images", "nowhere"], ["--bench", "1", "--batch", "3"]], ids=["images", "runs"])
def test_a_file_that_was_opened_and_then_failed_leaves_no_warning(
    tiny_file: Find, tmp_path: Path, options: list[str]
) -> None:
    model = load_onnx(tiny_file("traced"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    (tmp_path / "pairs.onnx").write_bytes(model.SerializeToString())
    command = [sys.executable, "-m", "fna.cli", "run", str(tmp_path / "pairs.onnx"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "never deactivated" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_engine_that_fails_after_it_was_activated_leaves_no_warning(
    engine: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from polygraphy.backend.base import BaseRunner

    class Runner(BaseRunner):  # type: ignore[misc]
        def __init__(self, engine: object) -> None:
            super().__init__("runner")
            self.context = engine

    def fail(*_arguments: object) -> None:
        raise MissingCapabilityError("debug tensors are not to be had")

    class Runtime:
        def __init__(self, _logger: object) -> None: ...

        def deserialize_cuda_engine(self, _data: bytes) -> object:
            return object()

    monkeypatch.setattr(FakeModule, "Runtime", Runtime, raising=False)
    monkeypatch.setattr(run, "import_flavour", lambda _name: FakeModule)
    monkeypatch.setattr(run, "make_logger", lambda _trt, _messages: None)
    monkeypatch.setattr(run, "_polygraphy_runner", lambda _backend: Runner)
    monkeypatch.setattr(run, "set_debug_state", fail)
    rewrite(engine, debug_tensors="blocks")
    with pytest.raises(MissingCapabilityError, match="not to be had"):
        run.Engine(engine)
    gc.collect()
    assert "never deactivated" not in "".join(capfd.readouterr())
