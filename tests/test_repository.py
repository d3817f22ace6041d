"""What the project promises about itself: layering, and documentation whose commands run."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import shutil
import subprocess
from itertools import takewhile
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from shared_build import cache_with_kernels

import fna
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
    front = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*front, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]


def shell_commands(path: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines() if line and not line.startswith("#")]


ALL_COMMANDS = [
    pytest.param(command, id=f"{path.name}: {command}") for path in documents() for command in shell_commands(path)
]


def test_every_command_of_the_documents_is_of_a_kind_that_a_test_runs() -> None:
    """Goals of make and fna's commands run below, examples in tests/examples, the rest in tests/engines/bundle."""
    for path in documents():
        for kind in re.findall(r"^```(.*)\n(?:.*\n)*?```$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert kind in ("", "sh", "sh device", "bash", "python", "json"), f"{path.name} has a block of {kind!r}"
            assert kind != "sh device" or path.name in ("deploy.md", "serving.md"), path.name
            assert kind != "bash" or path.name == "validate.md", path.name  # tests/validate runs Polygraphy's
        for command in shell_commands(path):
            assert command.startswith(
                (
                    "make ",
                    ".venv/bin/fna ",
                    ".venv/bin/python examples/",
                    ".venv/bin/python -m pytest",
                    ".venv/bin/python -m fna.engines.load_test",
                )
            ), command
            words = shlex.split(command)
            assert words[0] != ".venv/bin/python" or words[1] == "-m" or (ROOT / words[1]).is_file(), command
            assert words[:3] != [".venv/bin/python", "-m", "pytest"] or (ROOT / words[-1]).exists(), command


@pytest.mark.parametrize("command", [item for item in ALL_COMMANDS if item.values[0].startswith("make")])
def test_make_commands_of_the_documents_have_goals(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FNA_COMMANDS = {
    path: [command for command in shell_commands(path) if shlex.split(command)[0] == ".venv/bin/fna"]
    for path in documents()
}
SMALL = {"518": "224", "1022": "112", "128": "64"}
"""Sizes and counts of landmarks that the documents' commands name, and what they run with here."""


def make_small(command: str, build: Path) -> list[str]:
    """The words of a document's command as written, but small, with few runs, and with a build folder of its own."""
    words = [SMALL.get(word, word).replace("build/", f"{build}/") for word in shlex.split(command)[1:]]
    return ["1" if before == "--runs" else word for before, word in zip(["", *words], words, strict=False)]


def run_small(command: str, build: Path) -> int:
    """Run it."""
    words = make_small(command, build)
    assert words[0] in COMMANDS, command
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FNA_CACHE", str(cache_with_kernels()))
        return main(words)


@pytest.fixture(scope="session")
def front_pages_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the front page's first command writes, once for all workers: the other pages go on from it."""
    folder = tmp_path_factory.getbasetemp().parent / "front-page"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "model.onnx").exists():
            assert run_small(FNA_COMMANDS[ROOT / "README.md"][0], folder) == 0
    return folder / "model.onnx"


@pytest.mark.long
@pytest.mark.parametrize("page", [pytest.param(path, id=path.name) for path, lines in FNA_COMMANDS.items() if lines])
def test_a_documents_fna_commands_run_in_their_order(
    page: Path, front_pages_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(front_pages_model, tmp_path / "model.onnx")
    made_already = make_small(FNA_COMMANDS[ROOT / "README.md"][0], tmp_path)
    for command in FNA_COMMANDS[page]:
        if make_small(command, tmp_path) != made_already:
            assert run_small(command, tmp_path) == 0, (command, capsys.readouterr().err)


def test_links_of_the_documents_lead_somewhere() -> None:
    for path in documents():
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_links_into_a_page_lead_to_a_heading() -> None:
    for path in documents():
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
            page = path.parent / target if target else path
            assert anchor in headings(page), f"{path.name} links to {target}#{anchor}"


NO_FILES = ("near_edges.py",)
"""What a document names as an example."""

NOT_IN_PYTHON = {"fna.processor", "fna.landmarks", "fna.guided"}
"""Names that CHANGELOG.md says are gone, and a domain of operators."""

FOLDERS = ("fna", "export", "plugins", "engines", "validate", "studies", "tests", "examples", "docs")


def test_files_that_the_documents_name_are_there() -> None:
    for path in documents():
        for name in re.findall(r"`([\w./-]+/[\w./-]*)`", path.read_text(encoding="utf-8")):
            if name.split("/")[0] in FOLDERS:
                assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"
        for name in re.findall(r"`([\w.]+\.(?:py|cpp|hpp|mk))`", path.read_text(encoding="utf-8")):
            assert name in NO_FILES or any(file.name == name for file in tracked_files()), f"{path.name} names {name}"


def test_python_names_that_the_documents_name_can_be_imported() -> None:
    names = {
        name for path in documents() for name in re.findall(r"`(fna(?:\.\w+)+)", path.read_text(encoding="utf-8"))
    } - NOT_IN_PYTHON
    assert len(names) > 5
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


def test_the_documents_prose_fits_a_screen() -> None:
    for path in documents():
        fenced = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            fenced ^= line.startswith("```")
            free = fenced or line.startswith(("|", "![", "    ", "```"))
            assert free or len(line) < 120, f"{path.relative_to(ROOT)}:{number} has {len(line)} characters"


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git repository: an unpacked archive has nothing to list")
    return [ROOT / name for name in done.stdout.splitlines()]


def test_no_file_refers_to_a_document_that_readers_do_not_have() -> None:
    missing = re.compile(r"\bDESIG[N]\b|\bFIEL[D]\.md")
    for path in tracked_files():
        if (
            path.suffix in (".py", ".md", ".cpp", ".hpp", ".mk", ".sh", ".toml", ".json", ".ipynb")
            or path.name == "Makefile"
        ):
            match = missing.search(path.read_text(encoding="utf-8")) if path.is_file() else None
            assert match is None, f"{path.relative_to(ROOT)} refers to {match[0]}"


def table_rows(page: str, columns: int) -> list[list[str]]:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("| `")]
    return [row for row in rows if len(row) == columns]


def test_the_designs_operators_are_those_of_the_registry() -> None:
    from fna.export.operators.registry import OPERATORS

    rows = {row[0].split("`")[1]: row[1:] for row in table_rows("docs/design.md", 4) if "/" not in row[0]}
    assert rows.keys() == OPERATORS.keys(), "docs/design.md: its table of operators needs a row for each"
    for name, operator in OPERATORS.items():
        for cell, parts in zip(rows[name], (operator.inputs, operator.outputs, operator.attributes), strict=True):
            assert {part.name for part in parts} <= set(re.findall(r"\w+", cell)), f"docs/design.md, {name}: {cell}"


def test_the_designs_samplers_are_those_of_the_registry() -> None:
    from fna.samplers import all_samplers

    rows = {re.sub(r"[`( ].*", "", row[0].strip("`")): row[2] for row in table_rows("docs/design.md", 3)}
    assert rows == {sampler.name: rows.get(sampler.name) for sampler in all_samplers()}
    for sampler in all_samplers():
        assert rows[sampler.name].startswith("yes" if sampler.looks_at_features else "no"), sampler.name


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_pages_python_runs(page: str) -> None:
    from transformers import Dinov2Config, Dinov2Model

    model = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=12, num_attention_heads=2, image_size=126)
    ).eval()
    names = {"model": model, "pixel_values": torch.zeros(1, 3, 126, 126)}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    assert names["outputs"].last_hidden_state.shape == (1, 82, 32)


def test_ci_runs_exactly_the_readmes_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]
    assert "make test" in shell_commands(ROOT / "README.md")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["make test"]
    python = [step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})]
    assert python == ["3.11"]


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == fna.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["preferred-citation"]["url"] in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(citation["preferred-citation"][key] for key in ("title", "authors", "year"))
    assert f"## {fna.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


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


def test_the_readmes_gains_and_losses_are_numbers_of_the_notebook() -> None:
    """Fidelity stands in notes/planning.md, both numbers in one row; speed in benchmarks.md; cycles in plugin.md
    and, of focal attention, in notes/plugin.md."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| setting | tokens |"))
    table = list(takewhile(lambda line: line.startswith("|"), lines[start + 3 :]))  # after the row of exact attention
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table]
    assert len(rows) > 10
    assert all(re.fullmatch(r"0\.\d{4}", cell) for row in rows for cell in row[2:4])
    fidelities = (ROOT / "docs" / "notes" / "planning.md").read_text(encoding="utf-8").splitlines()
    speeds = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    cycles = [
        line
        for page in ("plugin.md", "notes/plugin.md")
        for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    ]
    for setting, tokens, patches, class_token, speed, counted in rows:
        assert any(f"| {patches} |" in line and f"| {class_token} |" in line for line in fidelities), setting
        assert speed == "not timed" or re.search(rf"\| {tokens} \|.*\| {re.escape(speed)} \|", speeds), setting
        column = 5 if "S=64" in setting else 7
        found = [line.split("|")[column] for line in cycles if line.startswith(f"| 16 | {tokens} | ")]
        if "focal" in setting:
            found += [line.split("|")[4] for line in cycles if re.match(rf"\| 2 from 2.* \| {tokens} \|", line)]
        numbers = re.findall(r"\d\.\d+", " ".join(found))
        assert set(re.findall(r"\d\.\d+", counted)) <= {*numbers, "1.00"}, setting


def test_the_default_number_of_iterations_is_written_once() -> None:
    """In fna/attention.py; what a file means that does not say it stands in fna/plan.py, and is another number."""
    default = re.compile(r"iterations.{0,24}?[=(,{] ?6\b", re.IGNORECASE)
    places = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in LAYERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".cpp", ".hpp") and "tests" not in path.parts
        for line in path.read_text(encoding="utf-8").splitlines()
        if default.search(line) and not line.lstrip().startswith(("//", "#"))
    ]
    assert places == ["fna/attention.py: NEWTON_SCHULZ_ITERATIONS = 6", "fna/plan.py: ITERATIONS_OF_VERSION_1 = 6"]


def test_the_names_of_samplers_stand_in_their_files_alone() -> None:
    """And in plugins/, whose kernels are those of single samplers."""
    for folder in LAYERS.keys() - {"plugins"}:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "samplers" not in path.parts:
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"""["'](?:lattice|norm-grid)["']""", text), path.relative_to(ROOT)
