"""Models that a Python factory makes: `module.path:function`, with arguments behind a comma."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from fna.errors import ModelSourceError, first_line
from fna.export.sources.model_names import ModelName
from fna.export.sources.weights import fit_weights, read_weights


def call_factory(called: ModelName) -> nn.Module:
    """Return the model that a factory makes of the arguments; it may lie in the current folder.

    Raises:
        ModelSourceError: if it cannot be imported, is no function, fails, or returns no module.
    """
    module_path, function, name = called.source, called.model, f"{called.source}:{called.model}"
    with _importable_from_here():
        try:
            factory = getattr(importlib.import_module(module_path), function)
        except Exception as error:  # importing runs the user's code, which may raise anything
            raise ModelSourceError(f"model factory {name!r} cannot be imported: {first_line(error)}") from None
        if not callable(factory):
            raise ModelSourceError(
                f"model factory {name!r} is a {type(factory).__name__}, but a function that returns a model is needed"
            )
        try:
            model = factory(**called.arguments)
        except Exception as error:  # likewise
            raise ModelSourceError(
                f"model factory {name!r} raised {type(error).__name__}: {first_line(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelSourceError(
            f"model factory {name!r} returned a {type(model).__name__}, but a torch.nn.Module is needed"
        )
    if called.weights is not None:
        fit_weights(model, read_weights(called.weights), called.weights, name)
    return model


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Let a factory be imported from the current folder, as `python -m` would."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
