"""What `fna validate` takes beside ONNX files: engines and bundles, whole or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange
from fna.engines.builder.options import BuildOptions as EngineOptions
from fna.engines.bundle.write import BundleOptions, write_bundle
from fna.engines.device import find_gpu
from fna.engines.targets import find_target
from fna.errors import InputFileError
from fna.validate.budget.measure import validate_file
from fna.validate.photographs import load_labelled

ONE = BatchRange(1, 1, 1)


@pytest.fixture
def bundle(tiny, tmp_path: Path) -> Path:
    """A bundle without a plugin, in fp32."""
    options = BundleOptions(find_target("rtx-turing"), tiny.images[:1], ONE, precisions=("fp32",))
    write_bundle(tiny.file("fp32"), tmp_path / "bundle", options)
    return tmp_path / "bundle"


def test_a_bundle_is_validated_by_its_portable_model(tiny, bundle: Path) -> None:
    result, _ = validate_file(bundle, tiny.images[:1])
    assert result.kind == "bundle"
    assert [step.step for step in result.steps] == ["approximation", "export"]
    assert max(error.relative_l2 for error in result.steps[1].errors) < 1e-5


def test_a_damaged_bundle_is_refused_by_the_files_name(tiny, bundle: Path) -> None:
    model = next(path for path in sorted(bundle.rglob("*")) if "portable" in path.name)
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(InputFileError, match=model.name):
        validate_file(bundle, tiny.images[:1])


def test_an_engine_that_cannot_run_here_says_why_and_the_rest_is_measured(tiny, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if find_gpu() is not None:
        pytest.skip("this machine has a GPU")
    (tmp_path / "fp32.onnx").write_bytes(tiny.file("fp32").read_bytes())
    engine = tmp_path / "model.engine"
    build_engine(tmp_path / "fp32.onnx", engine, EngineOptions(targets=(find_target("rtx-ada"),)))
    result, _ = validate_file(engine, tiny.images[:1])
    assert [step.step for step in result.steps] == ["approximation", "export", "engine"]
    assert "needs an NVIDIA GPU of compute capability 8.9" in str(result.steps[2].not_measured)
    assert result.steps[1].errors
    assert result.failures() == []
    (tmp_path / "fp32.onnx").unlink()
    with pytest.raises(InputFileError, match="was built from fp32.onnx, which is not beside it"):
        validate_file(engine, tiny.images[:1])


def test_images_of_any_size_and_mode_are_taken_and_unreadable_ones_named(tiny, tmp_path: Path) -> None:
    Image.new("L", (30, 200), 128).save(tmp_path / "tall.png")
    Image.new("RGBA", (301, 77), (9, 99, 199, 50)).save(tmp_path / "wide.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    photographs = load_labelled(tmp_path)
    result, _ = validate_file(tiny.file("fp32"), photographs.images, skipped=photographs.skipped)
    assert result.images == ("tall.png", "wide.png")
    assert [line.split(":")[0] for line in result.skipped] == ["broken.jpg"]
