"""Files from timm, open_clip, torchvision, vit-pytorch and transformers 4: counts known by construction, numerics checked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from filelock import FileLock
from library_models import LIBRARIES, TRANSFORMERS_4, TRANSFORMERS_4_MODELS, Library
from library_packages import PACKAGES, installed, run_beside
from surgery_helpers import graft_and_compare

from fna.export.surgery.graft import inspect_file
from fna.export.surgery.recognise.rows import Decision

SCRIPT = Path(__file__).parents[2] / "support" / "library_models.py"
ALL = {**LIBRARIES, **TRANSFORMERS_4_MODELS}


def export_all(models: dict[str, Library], packages: tuple[str, ...], folder: Path) -> None:
    """Export every model of one environment, once for all workers of a test run."""
    libraries, reason = installed(packages, folder.with_name(folder.name + "_packages"))
    with FileLock(str(folder) + ".lock"):
        if (folder / "done").exists():
            return
        folder.mkdir(exist_ok=True)
        (folder / "done").write_text(reason)
        run_beside(libraries, SCRIPT, str(folder), *models)


@pytest.fixture
def exported(exports: Path, request: pytest.FixtureRequest) -> Path:
    """The file of one model; skips where the packages cannot be had."""
    name: str = request.getfixturevalue("name")
    old = name in TRANSFORMERS_4_MODELS
    models, packages = (TRANSFORMERS_4_MODELS, TRANSFORMERS_4) if old else (LIBRARIES, PACKAGES)
    folder = exports / ("transformers4" if old else "libraries")
    export_all(models, packages, folder)
    if reason := (folder / "done").read_text():
        pytest.skip(f"{packages[0]} and its companions could not be installed: {reason}")
    error = folder / f"{name}.error"
    assert not error.exists(), error.read_text()
    return folder / f"{name}.onnx"


@pytest.mark.parametrize("name", ALL)
def test_models_of_other_libraries(name: str, exported: Path, tmp_path: Path) -> None:
    library = ALL[name]
    rows = inspect_file(exported)
    refused = [row for row in rows if row.decision is Decision.REFUSED]
    assert len(rows) - len(refused) == library.replaced
    assert len(refused) == library.refused
    assert all(re.search(library.reason, row.reason) for row in refused), [row.reason for row in refused]
    if library.replaced:
        assert graft_and_compare(exported, tmp_path).replaced == library.replaced
