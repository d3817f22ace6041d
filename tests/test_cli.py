"""The command line as a user meets it: one line per error, exit codes, nothing left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fna.cli import COMMANDS, main, run_and_exit
from fna.export.sources.loading import LoadedModel, wrap_model
from fna.export.trace import TraceOptions, trace_model
from fna.files import save_model
from fna.plan import uniform_plan

FACTORY = """
import os
import torch
from transformers import Dinov2Config, Dinov2Model

def tiny():
    torch.manual_seed(int(os.environ.get("TINY_SEED", "0")))
    return Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one photograph, a factory module and a traced tiny model."""
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("cli")
    (folder / "tinyfactory.py").write_text(FACTORY)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "a.png")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    source: LoadedModel = wrap_model("tinyfactory:tiny", Dinov2Model(config))
    model, _ = trace_model(source, uniform_plan(2, layers="1", landmarks=6), TraceOptions(56, 56))
    save_model(model, folder / "tiny.onnx")
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_imports_neither_torch_nor_onnx_nor_tensorrt(arguments: list[str]) -> None:
    code = (
        "import sys; from fna.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'transformers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_command_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for name, (_, text) in COMMANDS.items():
        assert name in out
        assert text.split(";")[0] in out


def test_export_a_factory_then_run_and_read_its_json(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path, record = tmp_path / "model.onnx", tmp_path / "model.json"
    code, out, err = call(
        capsys, "export", "tinyfactory:tiny", "-o", path, "--layers", "all", "--landmarks", 5, "--json", record
    )
    assert (code, err) == (0, "")
    assert "FNA blocks 0-1 of 2" in out
    assert [block["landmarks"] for block in json.loads(record.read_text())["plan"]["blocks"]] == [5, 5]
    arrays = tmp_path / "out.npz"
    code, out, _ = call(capsys, "run", path, "--images", folder / "images", "-o", arrays)
    assert code == 0
    assert "a.png" in out
    assert np.load(arrays)["last_hidden_state"].shape == (1, 17, 32)


def test_bench_prints_and_writes_both_times(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    record = tmp_path / "bench.json"
    code, out, _ = call(capsys, "bench", "tinyfactory:tiny", "--landmarks", 4, "--runs", 2, "--json", record)
    assert code == 0
    (row,) = json.loads(record.read_text())["rows"]
    assert row["tokens"] == 17
    assert row["speedup"] == pytest.approx(row["dense"]["median"] / row["fna"]["median"])
    assert "speed-up" in out


def test_validation_within_tolerance_exits_with_0(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    errors = tmp_path / "errors"
    code, out, err = call(capsys, "validate", folder / "tiny.onnx", "--images", folder / "images", "--output", errors)
    assert (code, err) == (0, "")
    assert "approximation" in out
    assert sorted(path.name for path in errors.iterdir()) == ["errors.json", "overlay.png"]


def test_an_export_error_out_of_tolerance_exits_with_1(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other weights than those the file was traced with: a real mismatch.
    monkeypatch.setenv("TINY_SEED", "1")
    monkeypatch.chdir(folder)
    code, out, err = call(
        capsys, "validate", folder / "tiny.onnx", "--images", folder / "images", "--output", tmp_path / "errors"
    )
    assert code == 1
    assert "FAILED" in out
    assert "export: output last_hidden_state has relative L2 error" in err
    assert err.count("\n") == 1
    assert (tmp_path / "errors" / "errors.json").is_file()
    assert (tmp_path / "errors" / "overlay.png").is_file()


BAD = [
    pytest.param(["export", "tinyfactory:tiny", "-o", "{out}", "--resolution", "60"], "not a multiple of.*14.*56", id="resolution"),
    pytest.param(["export", "tinyfactory:tiny", "-o", "{out}", "--resolution", "x"], "resolution 'x'", id="resolution text"),
    pytest.param(["export", "tinyfactory:tiny", "-o", "{out}", "--landmarks", "18"], "18 landmarks.*17 tokens", id="S above N"),
    pytest.param(["export", "tinyfactory:tiny", "-o", "{out}", "--landmarks", "0"], "landmarks", id="no landmarks"),
    pytest.param(["export", "tinyfactory:tiny", "-o", "{out}", "--layers", "5"], "blocks 0 to 1", id="no such block"),
    pytest.param(["export", "tinyfactory:none", "-o", "{out}"], "tinyfactory:none.*cannot be imported", id="no such factory"),
    pytest.param(["export", "no-such-model", "-o", "{out}"], "no-such-model", id="unknown model"),
    pytest.param(["export", "tinyfactory:tiny", "-o", "{tmp}/no/x.onnx"], "cannot be written", id="no such folder"),
    pytest.param(["export", "tinyfactory:tiny", "-o", "{tmp}"], "it is a folder", id="output is a folder"),
    pytest.param(["export", "tinyfactory:tiny", "-o", "{out}", "--plan", "{tmp}/none.json"], "none.json", id="no plan"),
    pytest.param(["export", "tinyfactory:tiny"], "--output", id="no output"),
    pytest.param(["export", "tinyfactory:tiny", "-o", "{out}", "--batch", "0"], "--batch", id="batch"),
    pytest.param(["build", "{tmp}/none.onnx", "-o", "{out}"], "none.onnx does not exist", id="missing file"),
    pytest.param(["build", "{empty}", "-o", "{out}"], "is empty", id="empty file"),
    pytest.param(["build", "{text}", "-o", "{out}"], "cannot be read as an ONNX model|not an ONNX model", id="not ONNX"),
    pytest.param(["build", "{tiny}", "-o", "{out}", "--batch", "4:1"], "batch '4:1'", id="batch range"),
    pytest.param(["build", "{tiny}", "-o", "{out}", "--target", "voodoo"], "voodoo", id="target"),
    pytest.param(["run", "{tmp}/none.onnx"], "none.onnx", id="run: missing"),
    pytest.param(["run", "{tmp}/none.engine"], "none.engine does not exist", id="run: no engine"),
    pytest.param(["run", "{tiny}", "--images", "{tmp}/none"], "does not exist", id="no image folder"),
    pytest.param(["run", "{tiny}", "--images", "{broken}"], "no readable image.*broken.png", id="no readable image"),
    pytest.param(["validate", "{text}"], "ONNX", id="validate: not ONNX"),
    pytest.param(["bench", "tinyfactory:tiny", "--resolution", "57"], "multiple", id="bench: resolution"),
    pytest.param(["frobnicate"], "frobnicate", id="unknown command"),
    pytest.param(["export", "--frobnicate"], "frobnicate", id="unknown option"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    inputs = tmp_path / "inputs"
    (inputs / "broken").mkdir(parents=True)
    (inputs / "broken" / "broken.png").write_bytes(b"\x89PNG no image")
    (inputs / "empty.onnx").touch()
    (inputs / "text.onnx").write_text("this is no model")
    work = tmp_path / "work"
    work.mkdir()
    places = {
        "out": work / "out.bin", "tmp": work, "empty": inputs / "empty.onnx", "text": inputs / "text.onnx",
        "broken": inputs / "broken", "tiny": folder / "tiny.onnx",
    }  # fmt: skip
    code, _, err = call(capsys, *(argument.format(**places) for argument in arguments))
    assert code == 2, err
    assert err.count("\n") == 1
    assert err.startswith("fna: ")
    assert re.search(said, err), err
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("loaded", [True, False])
def test_cycles_are_left_alone_at_the_end_unless_tritons_bindings_would_say_what_is_left(
    loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr("sys.argv", ["fna", "--help"])
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    if loaded:
        monkeypatch.setitem(sys.modules, "triton", sys)
    else:
        monkeypatch.delitem(sys.modules, "triton", raising=False)
    with pytest.raises(SystemExit):
        run_and_exit()
    assert frozen == ([] if loaded else [True])


def test_a_corrupt_onnx_file_is_refused(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    whole = (folder / "tiny.onnx").read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("noise", whole[:100] + bytes(1000) + whole[1100:])):
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        for command in (["run", path], ["build", path, "-o", tmp_path / "x.engine"], ["validate", path]):
            code, _, err = call(capsys, *command)
            assert code == 2, (name, command, err)
            assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.onnx", "noise.onnx"]
