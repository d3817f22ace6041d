"""Models that the export tests share."""

from __future__ import annotations

import pytest
from tiny_files import make_tiny_dinov2

from fna.export.sources import LoadedModel, load_model


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    """The tiny DINOv2 as a model source."""
    from fna.export.sources import wrap_model

    return wrap_model("tests:tiny_dinov2", make_tiny_dinov2())


@pytest.fixture(scope="session")
def saliency_model() -> LoadedModel:
    """The built-in model with its real weights."""
    return load_model("dinov2-small-saliency")
