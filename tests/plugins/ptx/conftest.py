"""The PTX of the quick cases' kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared_build import BUILD, locked

from fna.plugins.ptx.cases import quick_cases
from fna.plugins.ptx.images import PtxImages, load_images
from fna.plugins.table.chips import FALLBACK

from ..conftest import compile_table


@pytest.fixture(scope="session")
def images(table: Path) -> PtxImages:
    """Compiled once for sm_80 and kept under build/; those that the tests' table has are not compiled again."""
    needed = tuple(dict.fromkeys(name for case in quick_cases() for name in case.variants))
    folder = BUILD / "test-ptx"
    with locked("table"):
        compile_table(folder, {needed: (80, FALLBACK)})
    return load_images(folder)
