"""Which block of an engine is to blame. The engine's manifest is of a real build; a stand-in on onnxruntime runs in its place."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from broken_files import break_file, change_weight, set_weight_to_nan, swap_key_and_value
from stand_in_engine import StandInEngine

from fna.engines.builder.build import build_engine
from fna.engines.builder.options import BatchRange, BuildOptions
from fna.engines.targets import find_targets
from fna.files import load_onnx
from fna.validate.blame.bisect import bisect, why_not_located
from fna.validate.budget.chain import Chain, open_chain, open_validated_file
from fna.validate.photographs import Photographs
from fna.validate.report.document import Document, Extras, make_document

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra 'rtx')")

PLACES = [(0, "output"), (1, "fna"), (1, "output"), (2, "fna"), (2, "output")]


def quietly(*_progress: object) -> None:
    """Say nothing."""


def build(folder: Path, source: Path, **options) -> Path:
    onnx = folder / source.name
    shutil.copy(source, onnx)
    settings = BuildOptions(targets=find_targets("rtx-ada"), batch=BatchRange(1, 1, 1), optimization_level=0, **options)
    build_engine(onnx, onnx.with_suffix(".engine"), settings)
    return onnx.with_suffix(".engine")


@pytest.fixture(scope="module")
def marked_engine(tiny_files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("marked"), tiny_files.file("fp32"), debug_tensors="blocks")


@pytest.fixture(scope="module")
def plain_engine(tiny_files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain"), tiny_files.file("fp32"))


def validate(tiny, engine: Path, model: Path, monkeypatch: pytest.MonkeyPatch, **extras) -> Document:
    monkeypatch.setattr("fna.validate.budget.chain._open_engine", lambda path: StandInEngine(path, load_onnx(model)))
    photographs = Photographs(tiny.images[:1])
    return make_document(engine, photographs, {}, None, None, Extras(**extras), quietly)[0]


def test_an_engine_that_agrees_is_looked_into_and_blamed_for_nothing(tiny, marked_engine: Path, monkeypatch) -> None:
    document = validate(tiny, marked_engine, tiny.file("fp32"), monkeypatch, bisect=True)
    assert document.bisection is not None
    places = document.bisection.places["engine"]
    assert [(place.block, place.part) for place in places] == PLACES
    assert all(place.relative_l2 < 1e-5 for place in places)
    assert document.failures() == []


@pytest.mark.parametrize("with_bisect", [False, True])
def test_an_engine_with_a_broken_block_has_it_named(
    tiny, marked_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_bisect: bool
) -> None:
    broken = break_file(tiny.file("fp32"), tmp_path / "broken.onnx", partial(swap_key_and_value, block=2))
    document = validate(tiny, marked_engine, broken, monkeypatch, bisect=with_bisect)
    (found,) = document.divergences
    assert (found.step, found.block, found.part) == ("engine", 2, "fna")
    assert found.cause == "node /blocks.2/FastNystromAttention runs on TensorRT's own operators in fp32"
    assert "engine: first divergence in block 2, FNA operator" in document.failures()[-1]


def test_a_broken_linear_layer_is_blamed_on_the_block_and_not_on_its_fna(
    tiny, marked_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = partial(change_weight, scope="model.encoder.layer.0.mlp.fc2", factor=1.3)
    broken = break_file(tiny.file("fp32"), tmp_path / "broken.onnx", change)
    (found,) = validate(tiny, marked_engine, broken, monkeypatch).divergences
    assert (found.block, found.part, found.cause) == (0, "output", None)


def test_nan_in_an_engine_is_named_by_the_first_place_that_holds_it(
    tiny, marked_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = partial(set_weight_to_nan, scope="model.encoder.layer.1.mlp.fc2")
    broken = break_file(tiny.file("fp32"), tmp_path / "nan.onnx", change)
    document = validate(tiny, marked_engine, broken, monkeypatch)
    (found,) = document.validation.not_finite
    assert (found.step, found.block, found.op_type) == ("engine", 1, "Add")
    attention = next(
        place.tensor for place in document_places(marked_engine) if (place.block, place.part) == (1, "fna")
    )
    assert f"the first of the engine's debug tensors after {attention}" in document.failures()[0]


def document_places(engine: Path):
    from fna.engines.manifest import read_manifest

    return read_manifest(engine).places


def test_an_engine_without_debug_tensors_says_how_to_build_one_with_them(
    tiny, plain_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = break_file(tiny.file("fp32"), tmp_path / "broken.onnx", partial(swap_key_and_value, block=2))
    document = validate(tiny, plain_engine, broken, monkeypatch, bisect=True)
    assert document.failures()[-1] == (
        "engine: which block is not known: fp32.engine was built without debug tensors; build it again with its other options and "
        "--debug-tensors blocks: fna build fp32.onnx -o fp32.engine --debug-tensors blocks"
    )
    assert document.bisection is not None
    assert document.bisection.not_measured["engine"] in document.failures()[-1]


def test_an_engine_that_agrees_but_cannot_be_looked_into_says_so(tiny, plain_engine: Path, monkeypatch) -> None:
    document = validate(tiny, plain_engine, tiny.file("fp32"), monkeypatch, bisect=True)
    assert document.failures() == []
    assert document.summary()[-1].startswith("not looked into: engine: fp32.engine was built without debug tensors")


def test_names_that_are_the_engines_own_locate_nothing_and_are_said_to(
    tiny, marked_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of unfused tensors, most of which TensorRT names itself."""
    chain = open_engine_chain(tiny, marked_engine, monkeypatch)
    assert chain.engine is not None
    inside = chain.engine.inspect
    chain.engine.inspect = lambda inputs: {f"__myl_{name}": array for name, array in inside(inputs).items()}
    assert why_not_located(chain, "engine") is None
    pixels = chain.metadata.preprocessing.apply(tiny.images[0][1], chain.height, chain.width)[None]
    found = bisect(chain, [("a", pixels)], {}, quietly)
    assert "has the name of a block boundary; build it again" in found.not_measured["engine"]


def open_engine_chain(tiny, engine: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    monkeypatch.setattr(
        "fna.validate.budget.chain._open_engine", lambda path: StandInEngine(path, load_onnx(tiny.file("fp32")))
    )
    return open_chain(open_validated_file(engine), None, quietly)
