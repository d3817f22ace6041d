"""`fna validate` and `fna bench` as a user meets them: files left, exit codes, one line per error; and Polygraphy on our files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from broken_files import break_file, swap_key_and_value

from fna.cli import main
from fna.engines.bundle.format import MANIFEST
from fna.export.passes.lower import lower
from fna.files import load_onnx

DOCUMENT = Path(__file__).parents[2] / "docs" / "validate.md"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_broken_block_is_named_in_the_one_line_of_the_error(capsys, tiny, tmp_path: Path) -> None:
    broken = break_file(tiny.file("fp32"), tmp_path / "broken.onnx", lambda model: swap_key_and_value(model, block=2))
    code, out, err = call(capsys, "validate", broken, "--images", "images", "--output", tmp_path / "out")
    assert code == 1
    assert err.count("\n") == 1
    assert "export: output last_hidden_state has relative L2 error" in err
    assert "node /blocks.2/FastNystromAttention: its key and value are exchanged" in err
    assert "FAILED" in out
    document = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert document["divergences"][0]["block"] == 2


def test_a_grafted_file_is_validated_against_its_original(capsys, tiny, tmp_path: Path) -> None:
    code, out, err = call(
        capsys, "validate", tiny.file("grafted"), "--images", "images", "--output", tmp_path, "--original", "dense.onnx"
    )
    assert (code, err) == (0, "")
    assert "grafted.onnx: dense.onnx, 2 photographs" in out


def test_an_approximation_out_of_the_tolerance_given_exits_with_1(capsys, tiny, tmp_path: Path) -> None:
    code, _, err = call(
        capsys,
        "validate",
        tiny.file("fp32"),
        "--images",
        "images",
        "--output",
        tmp_path,
        "--tolerance",
        "approximation=1e-9",
    )
    assert code == 1
    assert "fna: approximation: output last_hidden_state has relative L2 error" in err


def test_quiet_prints_nothing(capsys, tiny, tmp_path: Path) -> None:
    code, out, err = call(capsys, "validate", tiny.file("fp32"), "--images", "images", "--output", tmp_path, "--quiet")
    assert (code, out, err) == (0, "", "")


BAD = [
    (["validate", "{fp32}", "--tolerance", "speed=1"], "names no step"),
    (["validate", "{fp32}", "--images", "{tmp}/none"], "image folder .*none does not exist"),
    (["validate", "{fp32}", "--images", "{empty}"], "no readable image in .*empty; supported: .jpg"),
    (["validate", "{empty}"], "empty.*manifest.json"),
    (["validate", "{tmp}/none.onnx"], "none.onnx does not exist"),
    (["validate", "{fp32}", "--report", "{tmp}/none/report.html"], "cannot be written"),
    (["validate", "{fp32}", "--report", "{tmp}/report.json"], "give a name ending in .html"),
    (["validate", "{grafted}", "--original", "{fp32}"], "not the file that grafted.onnx was grafted from"),
    (["validate", "{grafted}", "--images", "images", "--bench", "quick"], "times the PyTorch model"),
    (["bench", "validate_tiny:tiny", "--plot", "{tmp}/plot.gif"], "ending in .svg, .png or .pdf"),
    (["bench", "validate_tiny:tiny", "--landmarks", "500"], "500 landmarks .*, but at resolution 112 there are only 65 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tiny, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").mkdir()
    places = {"fp32": tiny.file("fp32"), "grafted": tiny.file("grafted"), "tmp": tmp_path, "empty": tmp_path / "empty"}
    code, _, err = call(capsys, *(argument.format(**places) for argument in arguments))
    assert code == 2, err
    assert err.count("\n") == 1
    assert re.search(said, err), err


def test_a_folder_with_a_damaged_manifest_is_no_bundle(capsys, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{}")
    code, _, err = call(capsys, "validate", tmp_path)
    assert code == 2
    assert err.count("\n") == 1


def polygraphy_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "--trt" not in line]


def test_polygraphy_runs_our_portable_file_as_the_document_says(tiny, tmp_path: Path) -> None:
    onnx.save(lower(load_onnx(tiny.file("fp32")), "portable"), tmp_path / "model.portable.onnx")
    commands = polygraphy_commands()
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command.replace("518", "112"))
        assert words[:2] == ["polygraphy", "run"]
        code = "import sys; from polygraphy.tools import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "PASSED" in done.stdout or "Completed" in done.stdout
