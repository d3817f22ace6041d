"""Names of models with arguments: `timm:vit_small_patch14_dinov2,img_size=518`, `my.models:make,size=518,weights=mine.pth`."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fna.errors import ModelSourceError

_BETWEEN = re.compile(r",(?![^()\[\]]*[)\]])")
"""Commas outside of brackets: `depths=(1,2)` is one argument."""


@dataclass(frozen=True)
class ModelName:
    """A model's name, taken apart.

    Attributes:
        source: before the colon: a library or a Python module.
        model: behind it: the library's name of a model, or a function.
        arguments: by name.
        weights: the file that `weights=` names, or None.
    """

    source: str
    model: str
    arguments: dict[str, Any]
    weights: Path | None


def with_weights(name: str, weights: Path | None) -> str:
    """Return a model's name with a file of weights in it, so that validation loads the same ones."""
    return name if weights is None else f"{name},weights={weights.resolve()}"


def parse_model_name(name: str) -> ModelName:
    """Take a name apart.

    Raises:
        ModelSourceError: for an argument that is no `name=value`, or given twice.
    """
    head, *parts = _BETWEEN.split(name)
    source, _, model = head.partition(":")
    arguments: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in arguments:
            raise ModelSourceError(
                f"argument {part!r} of model {name!r} cannot be read; write {head},size=518, each name once"
            )
        arguments[key] = _literal(value)
    weights = arguments.pop("weights", None)
    return ModelName(source, model, arguments, None if weights is None else Path(str(weights)))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
