"""Triton model repositories: the configurations as Triton's own protobuf reads them, and the models that onnxruntime can run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format

from fna.cli import main
from fna.engines.builder.options import BatchRange
from fna.engines.serving.model_repository import ModelRepository, make_preprocess_model, write_model_repository
from fna.errors import InputFileError, InvalidArgumentError
from fna.export.metadata import read_metadata, write_metadata
from fna.export.preprocessing import Preprocessing, bundled_photographs
from fna.files import file_sha256, load_onnx
from fna.runtime import open_session, run_session

BATCH = BatchRange(1, 4, 8)


@pytest.fixture(scope="module")
def model_config() -> Any:
    """Triton's ModelConfig. Loaded by its file: the package wants all of grpc for this one module."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or package.origin is None:
        pytest.skip("tritonclient is not installed: pip install tritonclient")
    path = Path(package.origin).parent / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("triton") / "models"
    written = write_model_repository(tiny, output, batch=BATCH)
    assert written == ModelRepository(("tiny", "tiny_onnxruntime", "tiny_portable", "tiny_preprocess", "tiny_tensorrt"))
    return output


@pytest.fixture(scope="module")
def configs(repository: Path, model_config: Any) -> dict[str, Any]:
    return {
        path.parent.name: text_format.Parse(path.read_text(), model_config.ModelConfig())
        for path in repository.glob("*/config.pbtxt")
    }


def shapes(tensors: Any) -> dict[str, tuple[int, list[int]]]:
    return {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in tensors}


def test_every_model_has_a_configuration_of_its_name_and_a_version(repository: Path, configs: dict[str, Any]) -> None:
    folders = {path.name for path in repository.iterdir() if path.is_dir()}
    assert folders == set(configs)
    for name, config in configs.items():
        assert config.name == name
        assert config.max_batch_size == 8
        assert (repository / name / "1").is_dir()
        if config.platform != "ensemble" and config.backend != "tensorrt":
            assert (repository / name / "1" / config.default_model_filename).is_file()


def test_the_engine_is_batched_as_its_profile_says(configs: dict[str, Any], model_config: Any) -> None:
    config = configs["tiny_tensorrt"]
    assert (config.platform, config.backend, config.default_model_filename) == (
        "tensorrt_plan",
        "tensorrt",
        "model.plan",
    )
    assert shapes(config.input) == {"pixel_values": (model_config.TYPE_FP32, [3, 56, 56])}
    assert shapes(config.output) == {
        "last_hidden_state": (model_config.TYPE_FP32, [17, 32]),
        "pooler_output": (model_config.TYPE_FP32, [32]),
    }
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.instance_group[0].kind == model_config.ModelInstanceGroup.KIND_GPU
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4, 8]
    assert list(config.model_warmup[0].inputs["pixel_values"].dims) == [3, 56, 56]


def test_an_ensembles_tensors_are_those_of_its_steps(configs: dict[str, Any], model_config: Any) -> None:
    """But for the rows, which preprocessing leaves open: of an empty photograph there are none, and the model refuses that."""
    for name, inner in (("tiny", "tiny_tensorrt"), ("tiny_portable", "tiny_onnxruntime")):
        ensemble = configs[name]
        first, second = ensemble.ensemble_scheduling.step
        assert [first.model_name, second.model_name] == ["tiny_preprocess", inner]
        assert shapes(ensemble.input) == shapes(configs["tiny_preprocess"].input)
        assert shapes(configs["tiny_preprocess"].output) == {"pixel_values": (model_config.TYPE_FP32, [3, -1, 56])}
        assert shapes(configs[inner].input) == {"pixel_values": (model_config.TYPE_FP32, [3, 56, 56])}
        assert shapes(ensemble.output) == shapes(configs[inner].output)
        assert set(first.output_map.values()) == set(second.input_map.values())
        assert set(second.output_map.values()) == {tensor.name for tensor in ensemble.output}


def test_the_portable_ensemble_run_by_hand_gives_the_files_own_outputs(tiny: Path, repository: Path) -> None:
    photographs = bundled_photographs()[:2]
    pixels = np.stack([Preprocessing().apply(image, 56, 56) for _, image in photographs])
    expected = run_session(open_session(tiny), {"pixel_values": pixels})
    preprocess = open_session(repository / "tiny_preprocess" / "1" / "model.onnx")
    parts = [
        run_session(preprocess, {"raw_image": np.asarray(image)[None]})["pixel_values"] for _, image in photographs
    ]
    model = open_session(repository / "tiny_onnxruntime" / "1" / "model.onnx")
    outputs = run_session(model, {"pixel_values": np.concatenate(parts)})
    for name, array in expected.items():
        assert (
            np.linalg.norm(outputs[name] - array) / np.linalg.norm(array) < 2e-3
        )  # photographs differ by a byte here and there


def test_exact_blocks_are_onnxruntimes_own_attention_operator(tiny_file: Callable[[str], Path], tmp_path: Path) -> None:
    written = write_model_repository(tiny_file("traced"), tmp_path / "models", batch=BATCH)
    (folder,) = (name for name in written.models if name.endswith("_onnxruntime"))
    graph = load_onnx(tmp_path / "models" / folder / "1" / "model.onnx", tensors=False).graph
    assert "MultiHeadAttention" in {node.op_type for node in graph.node}


@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(224, 224), (518, 700)], ids=str)
def test_photographs_are_resized_as_pillow_does_it(resize: Any, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(resize=resize)
    made = make_preprocess_model(preprocessing, *size, "pixels")
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    name, image = bundled_photographs()[0]
    expected = preprocessing.apply(image, *size)
    (pixels,) = session.run(None, {"raw_image": np.asarray(image)[None]})[0]
    bytes_apart = np.abs(pixels - expected) * np.array(preprocessing.std).reshape(3, 1, 1) * 255
    assert bytes_apart.max() < 1.01, (
        name
    )  # Pillow computes in fixed point, so a value at a half may round the other way
    assert (bytes_apart > 0.5).mean() < 0.01


@pytest.mark.parametrize("sides", [(0, 0), (0, 8), (8, 0)], ids=str)
def test_an_empty_photograph_becomes_one_without_rows_not_an_error(sides: tuple[int, int]) -> None:
    """Triton's core refuses a shape of the client's with a 400; an operator that fails would be a 500."""
    made = make_preprocess_model(Preprocessing(), 28, 42, "pixels")
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (pixels,) = session.run(None, {"raw_image": np.zeros((2, *sides, 3), np.uint8)})
    assert pixels.shape == (2, 3, 0, 42)
    (pixels,) = session.run(None, {"raw_image": np.zeros((2, 1, 1, 3), np.uint8)})
    assert pixels.shape == (2, 3, 28, 42)


def test_a_filter_that_onnx_has_not_leaves_the_ensembles_out_and_says_so(tiny: Path, tmp_path: Path) -> None:
    model = load_onnx(tiny)
    metadata = read_metadata(model, "tiny").model_copy(update={"preprocessing": Preprocessing(resize="lanczos")})
    write_metadata(model, metadata)
    onnx.save(model, tmp_path / "tiny.onnx")
    written = write_model_repository(tmp_path / "tiny.onnx", tmp_path / "models", batch=BATCH)
    assert written.models == ("tiny_tensorrt", "tiny_onnxruntime")
    assert "lanczos" in written.left_out[0]
    assert "lanczos" in (tmp_path / "models" / "README.md").read_text()


def test_batch_1_is_not_batched(tiny: Path, tmp_path: Path, model_config: Any) -> None:
    write_model_repository(tiny, tmp_path / "models", batch=BatchRange(1, 1, 1))
    text = (tmp_path / "models" / "tiny_tensorrt" / "config.pbtxt").read_text()
    config = text_format.Parse(text, model_config.ModelConfig())
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (1, False)


def test_single_requests_have_to_fit(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="2:4:8 leaves out single requests"):
        write_model_repository(tiny, tmp_path / "models", batch=BatchRange(2, 4, 8))


def test_writing_again_keeps_the_engine_and_nothing_else_is_overwritten(
    tiny: Path, repository: Path, tmp_path: Path
) -> None:
    output = tmp_path / "models"
    write_model_repository(tiny, output, batch=BATCH)
    plan = output / "tiny_tensorrt" / "1" / "model.plan"
    plan.write_text("engine")
    assert write_model_repository(tiny, output, batch=BATCH).dropped == ()
    assert plan.read_text() == "engine"
    for path in (path for path in repository.rglob("*") if path.is_file()):
        assert file_sha256(output / path.relative_to(repository)) == file_sha256(path)
    (output / "someone-elses").mkdir()
    with pytest.raises(InputFileError, match="someone-elses"):
        write_model_repository(tiny, output, batch=BATCH)


def test_an_engine_of_another_file_of_the_same_name_is_dropped_and_said(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "models"
    write_model_repository(tiny, output, batch=BATCH)
    plan = output / "tiny_tensorrt" / "1" / "model.plan"
    plan.write_text("engine")
    model = load_onnx(tiny)
    model.doc_string = "another model"
    onnx.save(model, tmp_path / "tiny.onnx")
    arguments = ["bundle", str(tmp_path / "tiny.onnx"), "--triton-repository", str(output), "--batch", "1:4:8"]
    assert main(arguments) == 0
    assert not plan.exists()
    assert "dropped tiny_tensorrt/1/model.plan: it was built from another file" in " ".join(
        capsys.readouterr().out.split()
    )


def test_other_versions_of_a_model_are_left_alone(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "models"
    write_model_repository(tiny, output, batch=BATCH)
    others = [output / name / "7" / "model.any" for name in ("tiny_tensorrt", "tiny_onnxruntime", "tiny")]
    for other in others:
        other.parent.mkdir()
        other.write_text("someone's")
    write_model_repository(tiny, output, batch=BATCH)
    assert [other.read_text() for other in others] == ["someone's"] * 3


def test_the_engines_batch_sizes_are_those_of_the_configuration(repository: Path) -> None:
    """The default of a bundle is batch 1, with which Triton refuses the engine."""
    text = (repository / "README.md").read_text()
    assert "BUNDLE/build_engine.sh --batch 1:4:8 --output REPOSITORY/tiny_tensorrt/1/model.plan" in text


def test_cuda_graphs_are_captured_at_the_sizes_that_are_warmed_up(configs: dict[str, Any]) -> None:
    cuda = configs["tiny_tensorrt"].optimization.cuda
    assert cuda.graphs
    assert [spec.batch_size for spec in cuda.graph_spec] == [1, 4, 8]
    assert list(cuda.graph_spec[0].input["pixel_values"].dim) == [3, 56, 56]


def test_preprocessing_has_no_batcher_and_the_readme_says_what_that_means(
    repository: Path, configs: dict[str, Any]
) -> None:
    assert not configs["tiny_preprocess"].HasField("dynamic_batching")
    assert configs["tiny_onnxruntime"].HasField("dynamic_batching")
    text = (repository / "README.md").read_text()
    assert "Preprocessing has no batcher" in text
    assert "whose photographs have the same size" not in text


def test_both_ways_of_loading_the_plugin_are_written_down(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    assert "--backend-config=tensorrt,plugins=FOLDER/libfna_plugin_register.so" in text
    assert "LD_PRELOAD=FOLDER/libfna_plugin_register.so tritonserver" in text
    assert "{" not in text


def test_the_command_writes_a_repository_alone(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bundle", str(tiny), "--triton-repository", str(tmp_path / "models"), "--batch", "1:4"]) == 0
    assert "Triton models tiny, tiny_onnxruntime" in capsys.readouterr().out
