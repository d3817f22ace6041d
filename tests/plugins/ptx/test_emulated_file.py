"""`fna validate --emulate-plugin`: a file's FNA nodes in the real library, on the PTX machine, everything else on onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from PIL import Image

from fna.cli import main
from fna.export.sources.loading import load_model
from fna.export.trace import TraceOptions, trace_model
from fna.files import save_model
from fna.plan import Plan, uniform_plan
from fna.plugins.ptx.emulated_plugin import EmulatedGpu, emulated_plugin
from fna.validate.budget.emulated import EmulatedFile
from fna.validate.budget.rounding import round_everywhere
from fna.validate.budget.runners import OnnxRunner

SIDE = 32


@pytest.fixture(scope="module")
def plugin(table: Path, programs) -> Iterator[ProcessPoolExecutor]:
    with emulated_plugin(EmulatedGpu(programs.folder, table)) as pool:
        yield pool


@pytest.fixture(scope="module")
def half() -> ModelProto:
    """A ViT of four blocks, the last two FNA with 20 landmarks, in fp16."""
    plan = uniform_plan(4, layers="2-3", landmarks=20)
    return trace_model(load_model("tiny_vit:make_vit"), plan, TraceOptions(SIDE, SIDE, precision="fp16"))[0]


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_the_file_with_the_plugin_is_the_file(plugin: ProcessPoolExecutor, half: ModelProto, tmp_path: Path) -> None:
    said: list[tuple] = []
    emulated = EmulatedFile(half, tmp_path, "tiny", plugin, lambda *progress: said.append(progress))
    found = emulated.run(pixels())
    wanted = OnnxRunner(round_everywhere(half), tmp_path, "tiny").run(pixels())
    assert set(found) == set(wanted)
    errors = [relative(found[name], wanted[name]) for name in wanted]
    assert 0 < max(errors) < 3e-4  # the kernels round otherwise, so the same numbers would not be theirs
    assert [(number, count) for _, number, count in said] == [(0, 2), (1, 2)]
    assert all("s left" in text for text, *_ in said)


def test_focal_nodes_run_in_the_plugin(plugin: ProcessPoolExecutor, tmp_path: Path) -> None:
    fields = {"num_blocks": 4, "blocks": [{"block": 3, "landmarks": 20}], "focal": [{"block": 1, "tile": 4, "hot": 3}]}
    model = trace_model(
        load_model("tiny_vit:make_vit"), Plan.model_validate(fields), TraceOptions(SIDE, SIDE, precision="fp16")
    )[0]
    emulated = EmulatedFile(model, tmp_path, "tiny", plugin, lambda *_: None)
    assert [node.op_type for node in emulated.nodes] == ["FocalAttention", "FastNystromAttention"]
    found = emulated.run(pixels())
    wanted = OnnxRunner(round_everywhere(model), tmp_path, "tiny").run(pixels())
    assert 0 < max(relative(found[name], wanted[name]) for name in wanted) < 5e-4  # the step of fp16


def test_a_wrong_landmark_in_a_node_shows(plugin: ProcessPoolExecutor, half: ModelProto, tmp_path: Path) -> None:
    """What the plugin is given comes from the file: other landmarks there, another result here."""
    other = ModelProto()
    other.CopyFrom(half)
    landmarks = EmulatedFile(half, tmp_path, "tiny", plugin, print).nodes[0].input[3]
    for tensor in other.graph.initializer:
        if tensor.name == landmarks:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:, ::-1] // 2 + 1, landmarks))
    found = EmulatedFile(other, tmp_path, "tiny", plugin, lambda *_: None).run(pixels())
    wanted = OnnxRunner(round_everywhere(half), tmp_path, "tiny").run(pixels())
    assert max(relative(found[name], wanted[name]) for name in wanted) > 1e-3


def test_fna_validate_has_a_row_of_its_own(
    table: Path, programs, half: ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    gpu = EmulatedGpu(programs.folder, table)
    monkeypatch.setattr("fna.validate.report.document.emulated_plugin", lambda: emulated_plugin(gpu))
    save_model(half, tmp_path / "tiny.onnx")
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(1).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "a.png")
    command = ["validate", str(tmp_path / "tiny.onnx"), "--images", str(tmp_path / "images"), "--emulate-plugin"]
    assert main(command) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("plugin"))
    assert row.split()[-1] == "ok"
    assert main([*command, "--tolerance", "plugin=1e-7", "--bisect"]) == 1
    assert "plugin: output" in capsys.readouterr().err


def test_without_a_built_plugin_it_says_what_to_build(half: ModelProto, tmp_path: Path, monkeypatch, capsys) -> None:
    gpu = EmulatedGpu(tmp_path, tmp_path)
    monkeypatch.setattr("fna.validate.report.document.emulated_plugin", lambda: emulated_plugin(gpu))
    save_model(half, tmp_path / "tiny.onnx")
    assert main(["validate", str(tmp_path / "tiny.onnx"), "--emulate-plugin"]) == 3
    assert "run: fna plugin" in capsys.readouterr().err
