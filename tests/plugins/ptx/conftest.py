"""The PTX of the quick cases' kernels."""

from __future__ import annotations

import pytest
from shared_build import BUILD, KERNEL_CACHE, locked

from fna.plugins.ptx.cases import quick_cases
from fna.plugins.ptx.images import PtxImages, load_images

from ..conftest import variants_named


@pytest.fixture(scope="session")
def images() -> PtxImages:
    """Compiled once for sm_80 and kept under build/."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    from fna.plugins.table.build import build_table

    needed = {name for case in quick_cases() for name in case.variants}
    folder = BUILD / "test-ptx"
    with locked("ptx-table"):
        build_table(folder, chips=(80, 0), variants=variants_named(needed), jobs=2, cache=KERNEL_CACHE)
    return load_images(folder)
