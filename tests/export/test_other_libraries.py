"""Models of other libraries and of several towers: what is found in them, and their files against PyTorch; docs/models.md shows it.

`PYTHONPATH=tests/support python tests/export/test_other_libraries.py` carries every model to onnxruntime and writes the table; the
tests find every model's blocks and carry those of `CARRIED`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from carried_models import carry, describe, table_row
from filelock import FileLock
from library_packages import PACKAGES, installed, run_beside

SUPPORT = Path(__file__).parents[1] / "support"
DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
MARKS = ("<!-- other libraries -->\n", "<!-- end of other libraries -->")

LIBRARY_MODELS = (
    "timm ViT",
    "timm DeiT III",
    "timm EVA-02",
    "timm DINOv2 with registers",
    "timm DINOv3",
    "timm SigLIP",
    "open_clip ViT",
    "torchvision ViT",
    "timm BEiT",
    "timm Swin",
    "timm SAM",
)
OWN_MODELS: dict[str, tuple[str, int | None]] = {
    "torch.nn.TransformerEncoder": ("called_models:make_encoder", None),
    "4 images at once": ("called_models:make_scene,frames=4", None),
    "two towers": ("called_models:make_towers", None),
    "transformers DepthPro": ("tower_models:depth_pro", 2),
    "transformers RF-DETR backbone": ("tower_models:rf_detr_backbone", None),
    "transformers RF-DETR": ("tower_models:rf_detr", None),
    "transformers EoMT": ("tower_models:eomt", None),
    "transformers ViTPose": ("tower_models:vitpose", None),
    "transformers SAM 3 encoder": ("tower_models:sam3", None),
}
"""By name: where it is made, and the batch size of its file where that cannot be left open."""

CANNOT_BE_TRACED = {"transformers EoMT"}
CARRIED = (
    "timm DINOv3",
    "torch.nn.TransformerEncoder",
    "transformers DepthPro",
    "transformers RF-DETR backbone",
)
"""Of each way to attention one; the others take seconds each, and nothing new."""

Results = dict[str, dict[str, Any]]


def run_libraries(folder: Path, tasks: list[str]) -> Results:
    """Run tasks of `other_libraries` beside this process, once for all workers of a test run; skip where packages are missing."""
    libraries, reason = installed(PACKAGES, folder / "library_packages")
    if reason:
        pytest.skip(f"{PACKAGES[0]} and its companions could not be installed: {reason}")
    path = folder / "other_libraries.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            done = run_beside(libraries, SUPPORT / "other_libraries.py", str(path), *tasks)
            assert done.returncode == 0, done.stderr[-2000:]
    results: Results = json.loads(path.read_text())
    return results


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of one run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def libraries(folder: Path) -> Results:
    """What the models of the libraries gave."""
    tasks = [f"find {title}" for title in LIBRARY_MODELS if title not in CARRIED]
    tasks += [f"carry {title}" for title in LIBRARY_MODELS if title in CARRIED]
    return run_libraries(folder, [*tasks, "dinov2", "commands", "unknown", "argument", "tag"])


@pytest.fixture(scope="session")
def own(folder: Path) -> Results:
    """What the others gave, once for all workers of a test run."""
    path = folder / "own_models.json"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            results = {
                title: carry(name, batch) if title in CARRIED else describe(name)
                for title, (name, batch) in OWN_MODELS.items()
            }
            path.write_text(json.dumps(results))
    found: Results = json.loads(path.read_text())
    return found


def find(title: str, results: Results) -> dict[str, Any]:
    """The result of one model, carried or found."""
    return next(results[key] for key in (title, f"carry {title}", f"find {title}") if key in results)


def check_carried(result: dict[str, Any]) -> None:
    """The file computes what the patched model computes, and that is not exact attention."""
    assert "failed" not in result, result
    assert result["error"] < 1e-5
    assert result["effect"] > 1e-2
    assert sum("Attention" in node for node in result["nodes"]) >= 1


@pytest.mark.long
@pytest.mark.parametrize("title", [title for title in CARRIED if title in LIBRARY_MODELS])
def test_a_library_model_becomes_a_file_that_computes_what_it_computes(title: str, libraries: Results) -> None:
    check_carried(find(title, libraries))


@pytest.mark.long
@pytest.mark.parametrize("title", [title for title in CARRIED if title in OWN_MODELS])
def test_a_model_becomes_a_file_that_computes_what_it_computes(title: str, own: Results) -> None:
    check_carried(own[title])


def test_dinov2_by_timm_and_by_transformers_has_one_plan_and_the_same_tokens(libraries: Results) -> None:
    result = libraries["dinov2"]
    assert "failed" not in result, result
    assert result["layouts"][0] == result["layouts"][1] == [12, 1370, 6, 64, 1]
    assert result["plans"][0] == result["plans"][1]
    plan = json.loads(result["plans"][0])
    assert [len(plan[kind]) for kind in ("focal", "blocks")] == [6, 6]
    assert result["difference"] < 1e-4


def test_commands_take_a_library_s_model_from_weights_in_a_file_to_a_bundle(libraries: Results) -> None:
    result = libraries["commands"]
    assert "failed" not in result, result
    assert set(result["codes"].values()) == {0}, result["codes"]
    assert set(result["sources"]) == {result["source"]} == {result["plan"]["model"]}
    assert result["engine"]["plan"]["num_blocks"] == 2
    assert result["blocks"] == ["/blocks.1/FastNystromAttention"]
    planned = result["planned"]
    assert [planned[key] for key in ("height", "patch_size", "token_outputs")] == [140, 14, ["last_hidden_state"]]
    assert planned["preprocessing"]["mean"] == result["engine"]["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert planned["plan"]["blocks"] == result["plan"]["blocks"] != []
    assert result["errors"]["export"] < 1e-5 < 1e-2 < result["errors"]["approximation"]


def test_preprocessing_is_the_library_s_own(libraries: Results) -> None:
    assert find("timm SigLIP", libraries)["preprocessing"] == [[0.5, 0.5, 0.5], "bicubic"]
    assert find("timm EVA-02", libraries)["preprocessing"][0] != find("timm DINOv3", libraries)["preprocessing"][0]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("unknown", "timm cannot make timm:no_such_model"),
        ("argument", "colour"),
        ("tag", "pretrained=TAG with one of openai"),
    ],
)
def test_what_a_library_cannot_make_is_refused_in_one_line(task: str, reason: str, libraries: Results) -> None:
    assert reason in libraries[task]["error"]
    assert "\n" not in libraries[task]["error"]


def make_rows(results: Results) -> list[str]:
    """The table's lines."""
    return [table_row(title, find(title, results)) for title in (*LIBRARY_MODELS, *OWN_MODELS)]


def test_the_documented_table_is_what_this_run_gives(libraries: Results, own: Results) -> None:
    results = {**libraries, **own}
    table = DOCUMENT.read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]
    documented = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert list(documented) == [*LIBRARY_MODELS, *OWN_MODELS]
    for title in documented:
        line, row = documented[title], table_row(title, find(title, results))
        if title not in CARRIED:  # found, not run by a plan
            line, row = (text.rsplit("|", 2)[0] for text in (line, row))
        assert row == line, (
            "docs/models.md differs; write it anew: PYTHONPATH=tests/support python tests/export/test_other_libraries.py"
        )


def write_document() -> None:
    """Carry every model that can be, and put the table between the marks in docs/models.md."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp()) if len(sys.argv) < 2 else Path(sys.argv[1])
    refused = {"timm BEiT", "timm Swin", "timm SAM"}
    tasks = [f"{'find' if title in refused else 'carry'} {title}" for title in LIBRARY_MODELS]
    results = run_libraries(folder, tasks)
    for title, (name, batch) in OWN_MODELS.items():
        results[title] = describe(name) if title in CANNOT_BE_TRACED else carry(name, batch)
    failed = {title: result["failed"] for title, result in results.items() if "failed" in result}
    assert not failed, failed
    head = "| model | class, first block | blocks | FNA | exact, and why | prefix tokens | ONNX against PyTorch |\n"
    head += 7 * "|---" + "|\n"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    rows = "\n".join(make_rows(results))
    DOCUMENT.write_text(f"{before}{MARKS[0]}{head}{rows}\n{MARKS[1]}{after}", encoding="utf-8")
    print({title: (result["error"], result["effect"]) for title, result in results.items() if "effect" in result})


if __name__ == "__main__":
    write_document()
