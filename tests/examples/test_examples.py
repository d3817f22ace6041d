"""Every script and every notebook in examples/ runs, and prints what its page promises."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SCRIPTS = {
    "patch_a_model.py": r"blocks +6-11, 64 landmarks: class token 0\.99\d+, patches 0\.98\d+",
    "export_and_validate.py": r"export, saliency: relative L2 error \d\.\de-07, mean cosine 1\.00000",
}
"""What a run must print, as a regular expression."""


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs_and_prints_its_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    ended = None
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as stop:
        ended = stop.code
    assert not ended, ended
    assert re.search(SCRIPTS[name], printed := capsys.readouterr().out), printed


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebooks_cells_run_in_their_order_and_print_what_it_shows(
    notebook: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(code_cells(notebook)):
        exec(compile(source, f"{notebook.name}, code cell {number}", "exec"), names)
    outputs = [output for cell in json.loads(notebook.read_text())["cells"] for output in cell.get("outputs", [])]
    shown = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    printed = capsys.readouterr().out
    numbers = [float(number) for number in re.findall(r"\d\.\d{4}", printed)]
    assert numbers == pytest.approx([float(number) for number in re.findall(r"\d\.\d{4}", shown)], abs=2e-4)
    assert numbers


def test_every_example_is_run_and_is_on_its_page() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    tested_alone = {path.name.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")} & scripts
    assert scripts == SCRIPTS.keys() | tested_alone, (
        "a script in examples/ is not in this test's table, or the other way round"
    )
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in scripts | {path.name for path in NOTEBOOKS}:
        assert f"]({name})" in page


def test_notebooks_show_their_outputs_and_nothing_of_the_machine_they_ran_on() -> None:
    for notebook in NOTEBOOKS:
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert all(cell["execution_count"] for cell in cells)
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
        text = "".join("".join(output.get("text", "")) for cell in cells for output in cell["outputs"])
        assert "/" not in text
        assert "Warning" not in text
