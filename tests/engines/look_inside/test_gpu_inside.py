"""Looking into engines on a real GPU: debug tensors, and the block to blame. `make test-gpu` runs these.

No GPU has run them so far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from broken_files import break_file, change_weight, set_weight_to_nan, swap_key_and_value
from numpy.typing import NDArray
from stand_in_engine import pretend_built_from

from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange, BuildOptions
from fna.engines.device import find_gpu
from fna.engines.run.engine import Engine
from fna.engines.targets import TARGETS
from fna.errors import InvalidArgumentError
from fna.export.preprocessing import bundled_photographs
from fna.export.sources.loading import load_model
from fna.export.trace import TraceOptions, export_onnx
from fna.plan import uniform_plan
from fna.validate.photographs import Photographs
from fna.validate.report.document import Document, Extras, make_document

GPU = find_gpu()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPU is None, reason="this machine has no GPU")]

SIDE = 224
PLACES = [(block, part) for block in range(12) for part in (("fna", "output") if block > 5 else ("output",))]

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inside") / "good.onnx"
    plan = uniform_plan(12, layers="6-11", landmarks=64)
    export_onnx(load_model("dinov2-small-saliency"), plan, TraceOptions(SIDE, SIDE), path)
    return path


@pytest.fixture(scope="module")
def build() -> Build:
    """Builds a file for this GPU by TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")
    assert GPU is not None
    usable = [
        target for target in TARGETS if GPU.capability in target.capabilities and "tensorrt-rtx" in target.flavours
    ]
    if not usable:
        pytest.skip(f"TensorRT-RTX names no compute capability {GPU.capability / 10:.1f}")

    def make(path: Path, **options) -> Path:
        engine = path.with_name(f"{path.stem}-{options.get('debug_tensors')}.engine")
        if not engine.exists():
            build_engine(path, engine, BuildOptions(targets=tuple(usable[:1]), batch=BatchRange(1, 1, 1), **options))
        return engine

    return make


@pytest.fixture(scope="module")
def pixels() -> NDArray[np.float32]:
    model = load_model("dinov2-small-saliency")
    return model.preprocessing.apply(bundled_photographs()[0][1], SIDE, SIDE)[None]


def validate(engine: Path, **extras) -> Document:
    photographs = Photographs(bundled_photographs()[:1])
    return make_document(engine, photographs, {}, None, None, Extras(**extras), lambda *_progress: None)[0]


def relative_error(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("kind", ["blocks", "unfused"])
def test_debug_tensors_change_neither_outputs_nor_their_values(
    exported: Path, build: Build, pixels: NDArray[np.float32], kind: str
) -> None:
    plain, marked = Engine(build(exported)), Engine(build(exported, debug_tensors=kind))
    wanted = plain.run({"pixel_values": pixels})
    before = marked.run({"pixel_values": pixels})
    inside = marked.inspect({"pixel_values": pixels})
    after = marked.run({"pixel_values": pixels})
    for engine in (plain, marked):
        engine.close()
    assert set(before) == set(after) == set(wanted)
    for name, array in wanted.items():
        assert relative_error(array, before[name]) < 1e-3
        assert np.array_equal(before[name], after[name])
    assert inside


def test_every_block_boundary_is_handed_out_in_order(exported: Path, build: Build, pixels: NDArray[np.float32]) -> None:
    engine = Engine(build(exported, debug_tensors="blocks"))
    places = {place.tensor: (place.block, place.part) for place in engine.manifest.places}
    assert list(places.values()) == PLACES
    inside = engine.inspect({"pixel_values": pixels})
    engine.close()
    assert [places[name] for name in inside] == PLACES


def test_an_engine_without_debug_tensors_refuses(exported: Path, build: Build, pixels: NDArray[np.float32]) -> None:
    engine = Engine(build(exported))
    with pytest.raises(InvalidArgumentError, match="good-None.engine was built without debug tensors; build it again"):
        engine.inspect({"pixel_values": pixels})
    engine.close()


def test_a_good_engine_agrees_in_every_place(exported: Path, build: Build) -> None:
    document = validate(build(exported, debug_tensors="blocks"), bisect=True)
    assert document.failures() == []
    assert document.bisection is not None
    places = document.bisection.places["engine"]
    assert [(place.block, place.part) for place in places] == PLACES
    assert max(place.relative_l2 for place in places) < 1e-3


@pytest.mark.parametrize(
    ("change", "block", "part"),
    [
        (partial(swap_key_and_value, block=8), 8, "fna"),
        (partial(change_weight, scope="backbone.encoder.layer.3.mlp.fc2", factor=1.5), 3, "output"),
    ],
    ids=["swapped key and value", "changed weight"],
)
def test_the_broken_block_of_an_engine_is_named(exported: Path, build: Build, change, block: int, part: str) -> None:
    """Built from a broken file, and compared with the whole one."""
    broken = break_file(exported, exported.with_name(f"broken-{block}.onnx"), change)
    engine = build(broken, debug_tensors="blocks")
    pretend_built_from(engine, exported)
    (found,) = validate(engine).divergences
    assert (found.step, found.block, found.part) == ("engine", block, part)


def test_nan_in_an_engine_is_named_by_its_block(exported: Path, build: Build) -> None:
    change = partial(set_weight_to_nan, scope="backbone.encoder.layer.7.mlp.fc2")
    engine = build(break_file(exported, exported.with_name("nan.onnx"), change), debug_tensors="blocks")
    pretend_built_from(engine, exported)
    document = validate(engine)
    (found,) = document.validation.not_finite
    assert (found.step, found.block) == ("engine", 7)
    assert "NaN or infinite values on" in document.failures()[0]
