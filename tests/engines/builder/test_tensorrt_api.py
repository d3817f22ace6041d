"""The TensorRT flavour, which no machine here can run, against the real API of 10.3 and 11.4, and then with a recorded fake."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from onnx import TensorProto
from tensorrt_fake import FakeTensorRT
from tensorrt_surface import BINDINGS, NoSurfaceError, Surface, read_rtx_surface, read_surface
from tiny_engines import write_model

from fna.engines import flavours
from fna.engines.builder import build, network, progress
from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange, BuildOptions
from fna.engines.device import Gpu
from fna.engines.look_inside import debug_tensors
from fna.engines.manifest import Manifest
from fna.engines.run import engine as run
from fna.engines.run import replay
from fna.engines.targets import find_targets
from fna.errors import BuildError, InvalidArgumentError, MissingCapabilityError
from fna.export.passes.precision import cast_model
from fna.files import file_sha256, load_onnx, save_model

ORIN = Gpu("Orin", 87, 61 * 2**30, 16, "12.6")
L4 = Gpu("NVIDIA L4", 89, 24 * 2**30, 58, "12.6")

# Which of TensorRT's classes a name in our code stands for.
ROLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "_runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "context": "IExecutionContext",
    "_context": "IExecutionContext",
    "inspector": "EngineInspector",
    "registry": "IPluginRegistry",
    "creator": "IPluginCreatorV3One",
    "settings": "IRuntimeConfig",
    "layer": "ILayer",
    "network_layer": "ILayer",
    "network_tensor": "ITensor",
}
MODULE = ("trt", "_trt")

# Called for TensorRT-RTX alone, behind a look at the backend.
RTX_ONLY = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "ICudaEngine.create_runtime_config",
    "IRuntimeConfig.cuda_graph_strategy",
}

# Reached only by engines whose unfused tensors were marked, which 10.3 refuses to do.
LATER_THAN_10_3 = {"IExecutionContext.unfused_tensors_debug_state"}


@dataclass
class Uses:
    """Members of TensorRT's API that our code names, and how many arguments it passes to them."""

    names: set[str] = field(default_factory=set)
    calls: set[tuple[str, int]] = field(default_factory=set)


def uses_of_tensorrt() -> Uses:
    """By the abstract syntax of the modules that call it."""
    uses = Uses()
    modules = (
        (build, {"layer"}),
        (network, {"layer"}),
        (progress, set()),
        (debug_tensors, set()),
        (flavours, set()),
        (run, {"config", "layer", "profile"}),
        (replay, set()),
    )
    for module, ignored in modules:
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := _member(node.func, ignored)):
                uses.calls.add((name, len(node.args) + len(node.keywords)))
            if isinstance(node, ast.Attribute) and (name := _member(node, ignored)):
                uses.names.add(name)
    return uses


def _member(node: ast.AST, ignored: set[str]) -> str | None:
    """`trt.A.B` is A.B, `config.c` is IBuilderConfig.c."""
    if not isinstance(node, ast.Attribute) or node.attr.startswith("__"):
        return None
    owner = node.value
    if isinstance(owner, ast.Attribute) and _name(owner.value) in MODULE:
        return f"{owner.attr}.{node.attr}"
    name = _name(owner)
    if name in MODULE:
        return node.attr
    if name in ROLES and name not in ignored:
        return f"{ROLES[name]}.{node.attr}"
    return None


def _name(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def has(surface: Surface, name: str) -> bool:
    owner, _, member = name.partition(".")
    return owner in surface and (not member or member in surface[owner])


def argument_counts(documentation: str, name: str) -> Iterator[tuple[int, int]]:
    """For each overload in a pybind11 docstring, how many arguments it needs, and takes at most; `self` not counted."""
    for signature in re.findall(rf"{name}\((.*?)\) -> ", documentation):
        if "*args" in signature:
            continue
        parts = re.split(r",\s*(?![^\[<(]*[\]>)])", signature)
        parts = [part for part in parts if part and not part.startswith("self")]
        yield sum("=" not in part for part in parts), len(parts)


@pytest.fixture(scope="session", params=list(BINDINGS))
def surface(request: pytest.FixtureRequest) -> Surface:
    try:
        return read_surface(request.param)
    except NoSurfaceError as error:
        pytest.skip(f"the API of TensorRT {request.param} cannot be read: {error}")


@pytest.fixture(scope="session")
def oldest() -> Surface:
    try:
        return read_surface("10.3.0")
    except NoSurfaceError as error:
        pytest.skip(f"the API of TensorRT 10.3 cannot be read: {error}")


def test_the_uses_are_found() -> None:
    names = uses_of_tensorrt().names
    assert {"Builder", "BuilderFlag.VERSION_COMPATIBLE", "IBuilderConfig.set_timing_cache"} <= names
    assert {"INetworkDefinition.mark_debug", "IExecutionContext.set_debug_listener"} <= names
    assert {"IExecutionContext.execute_async_v3", "IPluginRegistry.load_library", "LayerType.PLUGIN_V3"} <= names
    assert len(names) > 45


def test_every_name_exists_in_tensorrt_10_3_and_11_4(surface: Surface) -> None:
    missing = {name for name in uses_of_tensorrt().names if not has(surface, name)} - LATER_THAN_10_3
    assert {name for name in missing if name not in RTX_ONLY and name.split(".")[0] not in RTX_ONLY} == set()


def test_what_came_after_10_3_exists_in_11_4() -> None:
    try:
        surface = read_surface("11.4.0.106")
    except NoSurfaceError as error:
        pytest.skip(f"the API of TensorRT 11.4 cannot be read: {error}")
    assert {name for name in LATER_THAN_10_3 if not has(surface, name)} == set()


def test_every_name_exists_in_tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")
    surface = read_rtx_surface()
    uses = uses_of_tensorrt().names
    assert {name for name in uses if not has(surface, name)} == set()
    assert uses >= {name for name in RTX_ONLY if "." in name}


def test_every_call_passes_as_many_arguments_as_the_signature_takes(surface: Surface) -> None:
    checked = 0
    for name, given in sorted(uses_of_tensorrt().calls):
        owner, _, member = name.partition(".")
        if not member or name in RTX_ONLY or not has(surface, name):
            continue
        counts = list(argument_counts(surface[owner][member], member))
        if counts:
            assert any(low <= given <= high for low, high in counts), (name, given, counts)
            checked += 1
    assert checked > 20


def fake_build(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake: FakeTensorRT,
    element_type: int = TensorProto.FLOAT16,
    gpu: Gpu = ORIN,
    **options,
) -> Manifest:
    plugin = tmp_path / "libfna_plugin.so"
    plugin.write_bytes(b"plugin")
    monkeypatch.setattr(build, "import_flavour", lambda _name: fake)
    monkeypatch.setattr(build, "find_gpu", lambda: gpu)
    monkeypatch.setattr(flavours, "find_gpu", lambda: gpu)
    path = write_model(tmp_path / "tiny.onnx", element_type=element_type)
    settings = BuildOptions(backend="tensorrt", batch=BatchRange(1, 4, 8), plugin=plugin, **options)
    return build_engine(path, tmp_path / "tiny.engine", settings)


def test_a_tensorrt_build_calls_only_what_exists_and_records_its_plugin_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surface: Surface
) -> None:
    fake = FakeTensorRT(surface, "10.3.0")
    manifest = fake_build(
        tmp_path,
        monkeypatch,
        fake,
        workspace_mib=64,
        optimization_level=4,
    )
    assert manifest.targets == ("jetson-agx-orin",)
    assert (manifest.backend, manifest.lowering, manifest.device) == ("tensorrt", "plugin", "Orin")
    assert [(layer.implementation, layer.requested, layer.precision) for layer in manifest.layers] == [
        ("plugin", "fp16", "fp16"),
        ("plugin", "fp16", "fp16"),
    ]
    assert manifest.inspection == "read from the engine"
    assert manifest.plugin_sha256 == file_sha256(tmp_path / "libfna_plugin.so")
    assert fake.loaded == [str(tmp_path / "libfna_plugin.so")]
    calls = dict(fake.calls)
    assert calls["IOptimizationProfile.set_shape"][1:] == ((1, 3, 32, 32), (4, 3, 32, 32), (8, 3, 32, 32))
    assert calls["IBuilderConfig.set_memory_pool_limit"] == (fake.MemoryPoolType.WORKSPACE, 64 * 2**20)
    assert calls["IBuilderConfig.clear_flag"] == (fake.BuilderFlag.TF32,)
    assert calls["Builder.create_network"] == (1 << int(fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED),)
    assert fake.settings["IBuilderConfig.builder_optimization_level"] == 4


def test_an_engine_for_other_chips_is_built_on_a_workstation_and_refused_on_a_jetson(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surface: Surface
) -> None:
    fake = FakeTensorRT(surface, "10.3.0")
    with pytest.raises(InvalidArgumentError, match=r"--hardware-compatible was asked for.*jetson-agx-orin"):
        fake_build(tmp_path, monkeypatch, fake, hardware_compatible=True)
    assert fake_build(tmp_path, monkeypatch, fake, gpu=L4, hardware_compatible=True).hardware_compatible
    assert fake.settings["IBuilderConfig.hardware_compatibility_level"] == fake.HardwareCompatibilityLevel.AMPERE_PLUS


def test_a_lost_plugin_layer_fails_the_build_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    fake = FakeTensorRT(oldest, "10.3.0", lost="/blocks.0/fna")
    with pytest.raises(BuildError, match=r"/blocks\.0/fna is not a plugin layer of the engine"):
        fake_build(tmp_path, monkeypatch, fake)
    assert not (tmp_path / "tiny.engine").exists()


def test_a_node_that_the_parser_did_not_give_to_the_plugin_fails_before_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    fake = FakeTensorRT(oldest, "10.3.0", parsed_away="/blocks.0/fna")
    with pytest.raises(BuildError, match=r"made no plugin layer of /blocks\.0/fna"):
        fake_build(tmp_path, monkeypatch, fake)
    assert "Builder.build_serialized_network" not in dict(fake.calls)


def test_a_plugin_layer_in_another_precision_fails_the_build_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    fake = FakeTensorRT(oldest, "10.3.0", layer_type="FP32")
    with pytest.raises(BuildError, match=r"/blocks\.0/fna runs in fp32, but fp16 was asked for"):
        fake_build(tmp_path, monkeypatch, fake)


def test_a_version_compatible_engine_may_run_its_own_host_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surface: Surface
) -> None:
    fake = FakeTensorRT(surface, "10.3.0")
    manifest = fake_build(tmp_path, monkeypatch, fake, version_compatible=True, lowering="portable")
    assert fake.arguments_of("IBuilderConfig.set_flag") == [(fake.BuilderFlag.VERSION_COMPATIBLE,)]
    assert (manifest.version_compatible, manifest.inspection) == (True, "read from the engine")


def test_a_version_compatible_engine_with_the_plugin_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    fake = FakeTensorRT(oldest, "10.3.0")
    with pytest.raises(InvalidArgumentError, match="--version-compatible.*libfna_plugin.so.*--lowering portable"):
        fake_build(tmp_path, monkeypatch, fake, version_compatible=True)
    assert not fake.arguments_of("Builder.build_serialized_network")


def test_the_inspector_is_asked_with_the_profiles_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    fake = FakeTensorRT(oldest, "10.3.0")
    manifest = fake_build(tmp_path, monkeypatch, fake)
    assert fake.arguments_of("IExecutionContext.set_input_shape") == [("pixel_values", (4, 3, 32, 32))]
    assert {layer.precision for layer in manifest.layers} == {"fp16"}


def test_a_type_that_the_inspector_does_not_give_is_the_networks_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    manifest = fake_build(tmp_path, monkeypatch, FakeTensorRT(oldest, "10.3.0", mute=True))
    assert [layer.precision for layer in manifest.layers] == ["fp16", "fp16"]
    assert manifest.inspection == (
        "read from the engine; the inspector gives no type of /blocks.0/sampler, /blocks.0/fna, which have the network's"
    )


def test_a_plugin_layer_of_another_type_in_the_network_fails_before_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    fake = FakeTensorRT(oldest, "10.3.0", network_type="FLOAT")
    with pytest.raises(BuildError, match=r"/blocks\.0/fna runs in fp32, but fp16 was asked for"):
        fake_build(tmp_path, monkeypatch, fake)
    assert not fake.arguments_of("Builder.build_serialized_network")


def test_timings_are_kept_per_device_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    folder = tmp_path / "timing"
    for stored in (b"", b"timings"):
        fake = FakeTensorRT(oldest, "10.3.0")
        fake_build(tmp_path, monkeypatch, fake, timing_cache=folder)
        assert dict(fake.calls)["IBuilderConfig.create_timing_cache"] == (stored,)
    assert [path.name for path in folder.iterdir()] == ["tensorrt-10.3.0-sm87-orin.timing"]


def test_turing_is_given_standard_operators_no_plugin_and_no_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface, tiny_file: Callable[[str], Path]
) -> None:
    fake = FakeTensorRT(oldest, "10.3.0")
    monkeypatch.setattr(flavours, "find_gpu", lambda: None)
    t4 = Gpu("Tesla T4", 75, 16 * 2**30, 40, "12.6")
    monkeypatch.setattr(build, "import_flavour", lambda _name: fake)
    monkeypatch.setattr(build, "find_gpu", lambda: t4)
    monkeypatch.setattr(flavours, "find_gpu", lambda: t4)
    path = write_model(tmp_path / "tiny.onnx")
    manifest = build_engine(path, tmp_path / "tiny.engine", BuildOptions(backend="tensorrt"))
    assert (manifest.targets, manifest.lowering, manifest.plugin_name) == (("t4",), "decomposed", None)
    assert fake.loaded == []
    save_model(cast_model(load_onnx(tiny_file("traced")), "bf16"), tmp_path / "bf16.onnx")
    with pytest.raises(InvalidArgumentError, match=r"bf16\.onnx is bf16, but t4 computes in fp32, fp16, int8 only"):
        build_engine(tmp_path / "bf16.onnx", tmp_path / "bf16.engine", BuildOptions(backend="tensorrt"))


def test_tensorrt_builds_for_no_other_device_than_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"GPU it runs on, Orin \(compute capability 8\.7\), not for jetson-thor"
    ):
        fake_build(tmp_path, monkeypatch, FakeTensorRT(oldest, "10.13"), targets=find_targets("jetson-thor"))


def test_without_a_gpu_tensorrt_is_refused_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    monkeypatch.setattr(build, "import_flavour", lambda _name: FakeTensorRT(oldest, "10.3.0"))
    monkeypatch.setattr(flavours, "find_gpu", lambda: None)
    path = write_model(tmp_path / "tiny.onnx")
    with pytest.raises(MissingCapabilityError, match="fna bundle"):
        build_engine(path, tmp_path / "tiny.engine", BuildOptions(backend="tensorrt"))


def test_a_plugin_library_without_our_operators_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: Surface
) -> None:
    fake = FakeTensorRT(oldest, "10.3.0")
    monkeypatch.setattr(fake, "loaded", _Forgetful())
    with pytest.raises(
        MissingCapabilityError, match="did not bring FarthestPointSampling version 1, FastNystromAttention"
    ):
        fake_build(tmp_path, monkeypatch, fake)


class _Forgetful(list):
    def append(self, _item: object) -> None:
        """The registry stays empty."""
