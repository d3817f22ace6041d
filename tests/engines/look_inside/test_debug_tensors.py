"""Debug tensors: which are marked, by the real TensorRT-RTX builder; what the listener does with them; engines stay what they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from tensorrt_fake import FakeTensorRT
from tensorrt_surface import NoSurfaceError, read_surface

from fna.cli import main
from fna.engines import flavours
from fna.engines.builder import build
from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BuildOptions
from fna.engines.device import Gpu
from fna.engines.flavours import make_logger
from fna.engines.look_inside.debug_tensors import find_places, make_listener, mark_debug_tensors
from fna.engines.manifest import Manifest, manifest_path, read_manifest
from fna.engines.run.engine import Engine
from fna.errors import BuildError, InvalidArgumentError, MissingCapabilityError
from fna.export.metadata import read_metadata
from fna.export.passes.lower import lower
from fna.export.sources.loading import wrap_model
from fna.files import load_onnx
from fna.validate.budget.block_parts import BlockPart, find_block_parts

Find = Callable[[str], Path]
PARTS = [(0, "output"), (1, "output"), (2, "fna"), (2, "output"), (3, "fna"), (3, "output")]


def places_of(path: Path):
    model = load_onnx(path)
    return model, find_places(model, read_metadata(model, path.name).plan)


@pytest.mark.parametrize("name", ["traced", "grafted"])
def test_places_are_the_outputs_of_fna_operators_and_blocks_in_order(tiny_file: Find, name: str) -> None:
    model, places = places_of(tiny_file(name))
    assert [(place.block, place.part) for place in places] == PARTS
    written = [tensor for node in model.graph.node for tensor in node.output]
    assert [place.tensor for place in places] == sorted((place.tensor for place in places), key=written.index)


def test_places_are_those_that_the_pytorch_modules_say(tiny_file: Find) -> None:
    """Found from the graph alone here, and from the names of modules there."""
    from tiny_files import make_tiny_dinov2

    model, places = places_of(tiny_file("traced"))
    wanted = find_block_parts(model, wrap_model("tests:tiny", make_tiny_dinov2()).module)
    assert {BlockPart(place.block, place.part): place.tensor for place in places} == wanted


def test_a_lowered_file_still_tells_its_fna_operators(tiny_file: Find) -> None:
    model, places = places_of(tiny_file("traced"))
    plan = read_metadata(model, "").plan
    lowered = find_places(lower(model, "portable"), plan)
    assert [place for place in lowered if place.part == "fna"] == [place for place in places if place.part == "fna"]


@pytest.fixture(scope="module")
def rtx():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")


def parse(trt, path: Path):
    """A network of the real parser, with everything that it refers to."""
    logger = make_logger(trt, [])
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(lower(load_onnx(path), "portable").SerializeToString())
    return network, (logger, builder, parser)


def tensors_of(network) -> dict:
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {tensor.name: tensor for layer in layers for tensor in map(layer.get_output, range(layer.num_outputs))}


@pytest.mark.parametrize("name", ["traced", "grafted"])
def test_the_real_parser_keeps_every_place_and_marks_add_no_output(rtx, tiny_file: Find, name: str) -> None:
    network, kept = parse(rtx, tiny_file(name))
    _, places = places_of(tiny_file(name))
    before = [network.get_output(index).name for index in range(network.num_outputs)]
    assert mark_debug_tensors("TensorRT-RTX", network, "blocks", places) == places
    marked = {name for name, tensor in tensors_of(network).items() if network.is_debug_tensor(tensor)}
    assert marked == {place.tensor for place in places}
    assert [network.get_output(index).name for index in range(network.num_outputs)] == before
    assert network.num_inputs == 1
    del network, kept


def test_a_network_without_any_place_is_an_error_that_says_so(rtx, tiny_file: Find) -> None:
    network, kept = parse(rtx, tiny_file("dense"))
    with pytest.raises(
        BuildError, match="none of the 6 block boundaries of the file is a tensor of TensorRT-RTX's network"
    ):
        mark_debug_tensors(
            "TensorRT-RTX", network, "blocks",
            [place.model_copy(update={"tensor": f"other_{place.tensor}"}) for place in places_of(tiny_file("traced"))[1]],
        )  # fmt: skip
    del network, kept


@pytest.fixture(scope="module")
def engines(rtx, tiny_file: Find, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Engines of the traced file with each kind of debug tensors, and without, by the command."""
    built = {}
    for kind in ("blocks", "unfused", "none"):
        built[kind] = tmp_path_factory.mktemp(kind) / "x.engine"
        arguments = ["--target", "rtx-ada", "--batch", "1", "--quiet"]
        arguments += [] if kind == "none" else ["--debug-tensors", kind]
        assert main(["build", str(tiny_file("traced")), "-o", str(built[kind]), *arguments]) == 0
    return built


@pytest.mark.parametrize("kind", ["blocks", "unfused"])
def test_engines_are_built_with_debug_tensors_and_say_so(engines: dict[str, Path], tiny_file: Find, kind: str) -> None:
    manifest = read_manifest(engines[kind])
    assert manifest.debug_tensors == kind
    assert manifest.places == places_of(tiny_file("traced"))[1]


def test_engines_are_built_without_debug_tensors_unless_asked(engines: dict[str, Path]) -> None:
    manifest = read_manifest(engines["none"])
    assert (manifest.debug_tensors, manifest.places) == (None, ())


def test_a_manifest_from_before_debug_tensors_is_still_read(engines: dict[str, Path], tmp_path: Path) -> None:
    engine = tmp_path / "x.engine"
    engine.write_bytes(engines["none"].read_bytes())
    data = json.loads(manifest_path(engines["none"]).read_text())
    del data["debug_tensors"], data["places"]
    manifest_path(engine).write_text(json.dumps(data))
    assert read_manifest(engine).debug_tensors is None


def test_the_marks_arrive_in_the_engine(engines: dict[str, Path], tiny_file: Find) -> None:
    """An engine names its tensors; marked ones more often."""
    marked, plain = engines["blocks"].read_bytes(), engines["none"].read_bytes()
    for place in places_of(tiny_file("traced"))[1]:
        assert marked.count(place.tensor.encode()) > plain.count(place.tensor.encode())


@pytest.fixture
def oldest():
    try:
        return read_surface("10.3.0")
    except NoSurfaceError as error:
        pytest.skip(f"the API of TensorRT 10.3 cannot be read: {error}")


def test_tensorrt_10_3_marks_blocks_and_refuses_to_mark_what_is_unfused(
    oldest, tiny_file: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the recorded fake, whose parser knows the plugin's nodes only."""
    fake = FakeTensorRT(oldest, "10.3.0", layer_type="FP32", network_type="FLOAT")
    orin = Gpu("Orin", 87, 61 * 2**30, 16, "12.6")
    monkeypatch.setattr(build, "import_flavour", lambda _name: fake)
    monkeypatch.setattr(build, "find_gpu", lambda: orin)
    monkeypatch.setattr(flavours, "find_gpu", lambda: orin)
    (tmp_path / "libfna_plugin.so").write_bytes(b"plugin")
    settings = {"backend": "tensorrt", "plugin": tmp_path / "libfna_plugin.so"}
    manifest = build_engine(
        tiny_file("traced"), tmp_path / "x.engine", BuildOptions(debug_tensors="blocks", **settings)
    )
    assert [(place.block, place.part) for place in manifest.places] == [(2, "fna"), (3, "fna")]
    marks = [arguments[0].name for name, arguments in fake.calls if name == "INetworkDefinition.mark_debug"]
    assert marks == [place.tensor for place in manifest.places]
    with pytest.raises(MissingCapabilityError, match="has no mark for the tensors that fusion leaves over"):
        build_engine(tiny_file("traced"), tmp_path / "y.engine", BuildOptions(debug_tensors="unfused", **settings))
    assert not (tmp_path / "y.engine").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32])
def test_the_listener_copies_what_it_is_shown_in_every_type(rtx, dtype) -> None:
    """As TensorRT calls it: an address, a location, a type, a shape, a name and a stream."""
    names = {np.float32: "FLOAT", np.float16: "HALF", ml_dtypes.bfloat16: "BF16", np.int32: "INT32"}
    listener = make_listener(rtx)
    values = np.arange(6).reshape(2, 3).astype(dtype)
    kind = getattr(rtx.DataType, names[dtype])
    for name in ("first", "second"):
        told = (values.ctypes.data, rtx.TensorLocation.HOST, kind, rtx.Dims([2, 3]), name, 0)
        assert listener.process_debug_tensor(*told)
    values[:] = 0  # the engine's memory is used again after the call
    assert list(listener.arrays) == ["first", "second"]
    np.testing.assert_array_equal(listener.arrays["second"], np.arange(6).reshape(2, 3))
    assert listener.arrays["first"].dtype == (np.int32 if dtype is np.int32 else np.float32)
    assert listener.problems == []


def test_what_the_listener_cannot_read_is_kept_as_a_problem_and_not_raised(rtx) -> None:
    listener = make_listener(rtx)
    told = (0, rtx.TensorLocation.HOST, rtx.DataType.FP8, rtx.Dims([1]), "odd", 0)
    assert not listener.process_debug_tensor(*told)
    assert listener.problems == ["odd: tensors of type FP8 cannot be read"]


class FakeRunner:
    """What `Engine` has of Polygraphy's runner; while it runs, it shows the context's listener two tensors, if they are on."""

    def __init__(self, trt) -> None:
        self.trt, self.context = trt, self
        self.on = self.unfused_tensors_debug_state = False  # as `Engine` leaves them when it opens
        self.listener, self.shown = None, 0

    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        self.on = flag
        return True

    def set_debug_listener(self, listener) -> bool:
        self.listener = listener
        return True

    def infer(self, inputs, *, copy_outputs_to_host: bool):
        assert copy_outputs_to_host
        if self.on or self.unfused_tensors_debug_state:
            for name in ("second", "first"):
                values = next(iter(inputs.values()))[0, 0, :2, :3].copy()
                told = (self.trt.DataType.FLOAT, self.trt.Dims([2, 3]), name, 0)
                self.listener.process_debug_tensor(values.ctypes.data, self.trt.TensorLocation.HOST, *told)
                self.shown += 1
        return {"tokens": np.zeros(1)}


def engine_with(runner: FakeRunner, manifest: Manifest) -> Engine:
    engine = Engine.__new__(Engine)
    engine.manifest, engine._trt, engine._runner, engine._name = manifest, runner.trt, runner, "x.engine"
    engine._engine = SimpleNamespace(get_tensor_dtype=lambda _name: runner.trt.DataType.FLOAT)
    engine._profiles, engine._profile = (manifest.profiles,), 0
    return engine


@pytest.mark.parametrize("kind", ["blocks", "unfused"])
def test_an_engine_hands_out_its_tensors_when_inspected_and_only_then(rtx, engines: dict[str, Path], kind: str) -> None:
    manifest = read_manifest(engines[kind])
    runner = FakeRunner(rtx)
    engine = engine_with(runner, manifest)
    pixels = np.random.default_rng(0).random((1, 3, 56, 56), dtype=np.float32)
    engine.run({"pixel_values": pixels})
    assert runner.shown == 0
    inside = engine.inspect({"pixel_values": pixels})
    assert list(inside) == ["second", "first"]
    np.testing.assert_array_equal(inside["first"], pixels[0, 0, :2, :3])
    assert set(engine.run({"pixel_values": pixels})) == {"tokens"}
    assert runner.shown == 2
    plain = engine_with(runner, manifest.model_copy(update={"debug_tensors": None}))
    with pytest.raises(InvalidArgumentError, match="x.engine was built without debug tensors; build it again"):
        plain.inspect({"pixel_values": pixels})
