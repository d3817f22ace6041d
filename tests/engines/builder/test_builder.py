"""The builder's options with the real TensorRT-RTX: targets, precisions, profiles, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from tiny_engines import write_model

from fna.cli import main
from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange, BuildOptions, check_precision
from fna.engines.look_inside.layers import (
    FnaLayer,
    RequestedLayer,
    check_layers,
    describe_layers,
    read_type,
    requested_layers,
)
from fna.engines.manifest import read_manifest
from fna.engines.targets import find_targets
from fna.errors import BuildError, InvalidArgumentError
from fna.export.metadata import read_metadata
from fna.export.preprocessing import bundled_photographs
from fna.export.surgery.graft import GraftOptions, graft
from fna.export.variants import FileVariant, make_variant
from fna.files import file_sha256, load_onnx

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")

Find = Callable[[str], Path]
THREE = "rtx-ampere,rtx-ada,rtx-blackwell"
FP16 = FileVariant("fp16", check=False)
INT8 = FileVariant(eight_bit=("int8",))
INT8_FP16 = FileVariant("fp16", ("int8",), check=False)
BUILDS = {
    "traced": [FileVariant(), FileVariant("bf16"), INT8],
    "grafted": [FP16, INT8_FP16],
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        pytest.param(name, variant, id=f"{name}-{variant.label}")
        for name, variants in BUILDS.items()
        for variant in variants
    ],
)
def test_engines_for_three_targets_in_every_precision(
    tiny_file: Find, tmp_path: Path, name: str, variant: FileVariant
) -> None:
    path = tiny_file(name)
    if variant.changes:
        path = tmp_path / f"{name}-{variant.label}.onnx"
        make_variant(tiny_file(name), path, variant, bundled_photographs()[:2])
    manifest = build_engine(path, tmp_path / "x.engine", BuildOptions(targets=find_targets(THREE)))
    assert manifest.compute_capabilities == (86, 89, 120)
    assert manifest.precision == variant.precision
    assert [layer.requested for layer in manifest.layers] == [variant.precision] * 2
    assert {layer.implementation for layer in manifest.layers} == {"operators"}
    assert manifest.onnx_sha256 == file_sha256(path)
    assert read_manifest(tmp_path / "x.engine") == manifest


@pytest.mark.parametrize("name", ["traced", "grafted"])
def test_fp8_is_built_for_chips_that_have_it_and_refused_for_others_by_name(
    tiny_file: Find, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "x.onnx"
    variant = FileVariant("fp16", ("fp8",), check=False)
    make_variant(tiny_file(name), path, variant, bundled_photographs()[:2])
    manifest = build_engine(path, tmp_path / "x.engine", BuildOptions(targets=find_targets("rtx-ada,rtx-blackwell")))
    assert manifest.compute_capabilities == (89, 120)
    for target in ("rtx-ampere", "jetson-agx-orin"):
        with pytest.raises(InvalidArgumentError, match=f"is fp8, but {target} computes in fp32, fp16, bf16, int8 only"):
            check_precision(path, read_metadata(load_onnx(path), "x"), find_targets(target))


def test_a_type_that_a_target_lacks_is_refused_before_anything_is_cast(
    tiny_file: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fna.export.variants.make_variant", lambda *_, **__: pytest.fail("it was cast"))
    engine = tmp_path / "x.engine"
    assert main(["build", str(tiny_file("traced")), "-o", str(engine), "--target", "rtx-ampere", "--fp8"]) == 2
    said = capsys.readouterr().err
    assert "fna: fp8 was asked for, but rtx-ampere computes in fp32, fp16, bf16, int8 only" in said


def test_pairs_that_another_tool_wrote_are_grafted_built_validated_and_bundled(
    tiny_file: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Model Optimizer writes them by ONNX Runtime's quantiser: int8 weights with DequantizeLinear alone."""
    source, path = tmp_path / "pairs.onnx", tmp_path / "grafted.onnx"
    quantize_by_onnxruntime(tiny_file("grafted").with_suffix(".source.onnx"), source)
    graft(source, path, GraftOptions(landmarks=5, layers="2-3"))
    assert read_metadata(load_onnx(path), "x").quantized == "int8"
    options = BuildOptions(targets=find_targets(THREE))
    assert build_engine(path, tmp_path / "x.engine", options).compute_capabilities == (86, 89, 120)
    assert main(["validate", str(path), "-o", str(tmp_path / "validation"), "--tolerance", "approximation=1"]) == 0
    assert main(["bundle", str(path), "-o", str(tmp_path / "x"), "--target", "t4", "--record", "1"]) == 0
    assert "1 photographs recorded" in " ".join(capsys.readouterr().out.split())


def quantize_by_onnxruntime(source: Path, target: Path) -> None:
    """Linear layers alone, symmetric."""
    nodes = [node.name for node in load_onnx(source).graph.node if re.search(r"(proj|fc\d)/MatMul", node.name)]
    assert len(nodes) == 24

    class OneImage(CalibrationDataReader):  # type: ignore[misc]
        images = iter([{"pixels": np.random.default_rng(0).normal(size=(1, 3, 56, 56)).astype(np.float32)}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.images, None)

    quantize_static(
        str(source),
        str(target),
        OneImage(),
        nodes_to_quantize=nodes,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "OpTypesToExcludeOutputQuantization": ["MatMul"],
        },
    )


def test_a_file_with_open_size_gets_a_profile_per_resolution(tiny_file: Find, tmp_path: Path) -> None:
    options = BuildOptions(
        targets=find_targets("rtx-ada"), batch=BatchRange(1, 2, 4), resolutions=((56, 56), (84, 112))
    )
    manifest = build_engine(tiny_file("dynamic"), tmp_path / "x.engine", options)
    shapes = [profile["pixel_values"] for profile in (manifest.profiles, *manifest.more_profiles)]
    assert [entry.largest for entry in shapes] == [(4, 3, 56, 56), (4, 3, 84, 112)]


def test_a_file_with_open_size_needs_a_resolution(tiny_file: Find, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="give --resolution"):
        build_engine(tiny_file("dynamic"), tmp_path / "x.engine", BuildOptions(targets=find_targets("rtx-ada")))


def test_a_file_of_one_size_is_not_built_for_another(tiny_file: Find, tmp_path: Path) -> None:
    options = BuildOptions(targets=find_targets("rtx-ada"), resolutions=((84, 84),))
    with pytest.raises(InvalidArgumentError, match="takes 56x56 images only, but --resolution asks for 84x84"):
        build_engine(tiny_file("traced"), tmp_path / "x.engine", options)


def test_a_file_of_one_batch_size_is_built_for_that_alone(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx")
    model = load_onnx(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    path.write_bytes(model.SerializeToString())
    manifest = build_engine(path, tmp_path / "x.engine", BuildOptions(targets=find_targets("rtx-ada")))
    assert manifest.profiles["pixel_values"].largest == (2, 3, 32, 32)
    with pytest.raises(InvalidArgumentError, match="batch size is fixed at 2"):
        build_engine(path, tmp_path / "x.engine", BuildOptions(batch=BatchRange(1, 4, 8)))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where this process was started in the background, which has shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupting_a_build_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.onnx")
    phases = []

    def interrupt(phase: str, _done: int, _total: int | None) -> None:
        if not phases:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # the signal reaches the main thread; on a busy machine the builder would run ahead of it
        phases.append(phase)

    with pytest.raises(KeyboardInterrupt):
        build_engine(path, tmp_path / "tiny.engine", BuildOptions(targets=find_targets("rtx-ada")), interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.onnx"]
    assert len(phases) < 100  # a whole build tells of about 400 steps


def test_progress_is_told_by_phase(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = write_model(tmp_path / "tiny.onnx")
    build_engine(
        path, tmp_path / "tiny.engine", BuildOptions(targets=find_targets("rtx-ada")), lambda *step: seen.append(step)
    )
    started = {phase for phase, done, total in seen if done == 0 and total is not None}
    ended = {phase for phase, _, total in seen if total is None}
    assert started == ended
    assert all(done <= total for _, done, total in seen if total is not None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lowering": "plugin"}, "--lowering plugin.*no plugin layers"),
        ({"version_compatible": True}, "--version-compatible"),
        (
            {"targets": find_targets("jetson-thor")},
            "TensorRT-RTX does not build for jetson-thor; it builds for rtx-ampere",
        ),
        ({"targets": find_targets("t4")}, "refuses fp32 matrix products"),
        ({"optimization_level": 6}, "0 to 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_the_flavour_does_not_take_are_refused(tmp_path: Path, options: dict, said: str) -> None:
    path = write_model(tmp_path / "tiny.onnx")
    with pytest.raises(InvalidArgumentError, match=said):
        build_engine(path, tmp_path / "tiny.engine", BuildOptions(**options))


def test_the_command_casts_writes_the_cast_file_and_builds_it(
    tiny_file: Find, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "x.engine"
    arguments = ["--precision", "fp16", "--keep-fp32", "0", "--target", "rtx-ada", "--batch", "1:2:4"]
    assert main(["build", str(tiny_file("grafted")), "-o", str(engine), *arguments]) == 0
    manifest = read_manifest(engine)
    assert manifest.onnx_name == "x-fp16.onnx"
    metadata = read_metadata(load_onnx(tmp_path / "x-fp16.onnx"), "x-fp16.onnx")
    assert (metadata.precision, metadata.fp32_blocks) == ("fp16", (0,))
    assert "FNA layers: 2, 0 by the plugin, inputs and outputs fp16" in capsys.readouterr().out


def test_the_types_of_fna_nodes_are_read_from_the_file(tiny_file: Find) -> None:
    layers = requested_layers(load_onnx(tiny_file("norm-grid")))
    assert [(layer.op_type, layer.precision) for layer in layers] == [
        ("NormGridLandmarks", "fp32"),
        ("FastNystromAttention", "fp32"),
        ("FastNystromAttention", "fp32"),
    ]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Row major linear FP32", "fp32"),
        ("Row major linear FP16 format", "fp16"),
        ("Half", "fp16"),
        ("BFloat16", "bf16"),
        ("Row major linear BF16 format", "bf16"),
        ("Row major Int8 format", "int8"),
        ("Int32", "int32"),
        ("Float", "fp32"),
        ("something new", "unknown"),
    ],
)
def test_types_in_the_inspectors_words(text: str, name: str) -> None:
    """Words quoted in reports of TensorRT 8.2 to 10."""
    assert read_type({"Name": "x", "Format/Datatype": text}) == name


def test_layers_by_operators_are_never_reported_missing() -> None:
    check_layers([FnaLayer(name="a", op_type="FastNystromAttention", implementation="operators", requested="fp16")])


def test_the_types_of_standard_operators_are_read_by_the_names_that_lowering_gives() -> None:
    """Layers as TensorRT's inspector writes them: fused ones name all that they came from."""
    requested = [RequestedLayer(f"/blocks.{number}/fna", "FastNystromAttention", "fp16") for number in (1, 11, 2)]
    layers = [
        {
            "Name": "__myl_CastMul",
            "Metadata": "[ONNX Layer: /blocks.1/fna/core]\x1e[ONNX Layer: /blocks.1/fna/w_0]",
            "Outputs": [{"Format/Datatype": "Float"}],
        },
        {"Name": "/blocks.1/fna/out", "Outputs": [{"Format/Datatype": "Half"}]},
        {"Name": "/blocks.11/fna/out", "Outputs": [{"Format/Datatype": "BFloat16"}]},
    ]
    found = describe_layers(requested, "portable", json.dumps({"Layers": layers}))
    assert [(layer.implementation, layer.precision) for layer in found] == [
        ("operators", "fp16+fp32"),
        ("operators", "bf16"),
        ("operators", None),
    ]
    check_layers(found)
