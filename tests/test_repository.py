"""What the project promises about itself: layering, and documentation whose commands run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from fna.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
LAYERS = {
    "fna": set(),
    "export": {"fna.export"},
    "plugins": {"fna.plugins"},
    "engines": {"fna.export", "fna.plugins", "fna.engines"},
    "validate": {"fna.export", "fna.plugins", "fna.engines", "fna.validate"},
}
UPPER = {"fna.export", "fna.plugins", "fna.engines", "fna.validate"}
COMMAND_LINE = ("cli.py", "commands")


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("folder", LAYERS)
def test_no_module_imports_upwards(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        if folder == "fna" and path.relative_to(ROOT / "fna").parts[0] in COMMAND_LINE:
            continue
        upper = {".".join(name.split(".")[:2]) for name in imported_modules(path)} & UPPER
        assert upper <= LAYERS[folder], f"{path} imports {sorted(upper - LAYERS[folder])}"


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_commands(path: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines() if line and not line.startswith("#")]


ALL_COMMANDS = [
    pytest.param(command, id=f"{path.name}: {command}") for path in documents() for command in shell_commands(path)
]


@pytest.mark.parametrize("command", [item for item in ALL_COMMANDS if item.values[0].startswith("make")])
def test_make_commands_of_the_documents_have_goals(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_documents_fna_commands_run_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As written, but at 224 pixels, with few runs, and into a folder of the test's own."""
    ran = 0
    for path in documents():
        for command in shell_commands(path):
            words = shlex.split(command)
            if words[0] != ".venv/bin/fna" or words[1] not in COMMANDS:
                continue
            small = [re.sub(r"^(518|1022)$", "224", word) for word in words[1:]]
            small = [word.replace("build/", f"{tmp_path}/") for word in small]
            small = ["1" if before == "--runs" else word for before, word in zip(["", *small], small, strict=False)]
            assert main(small) == 0, (command, capsys.readouterr().err)
            ran += 1
    assert ran >= 4


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in documents():
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]
    assert "make test" in shell_commands(ROOT / "README.md")


def test_bare_make_prints_the_goals() -> None:
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for goal in ("setup", "export", "engine", "validate", "bench", "test", "lint", "clean"):
        assert f"make {goal}" in done.stdout


def test_the_readmes_models_are_rows_of_the_measured_table() -> None:
    def rows(path: Path) -> list[list[str]]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| ")]

    measured = {(row[0], row[1], row[3]) for row in rows(ROOT / "docs" / "models.md") if len(row) == 7}
    claimed = [
        tuple(row) for row in rows(ROOT / "README.md") if len(row) == 3 and row[1].startswith("`") and row[2].isdigit()
    ]
    assert len(claimed) == 11
    assert set(claimed) <= measured
