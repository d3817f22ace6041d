"""Weights from a local file, into a model that has them under the same names; nothing but tensors is ever read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fna.errors import InputFileError, ModelSourceError, first_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_NESTED = ("state_dict", "model", "teacher", "model_state_dict")
_TRAINING_ONLY = ("mask_token", "num_batches_tracked")
_NAMES_SHOWN = 3


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights: safetensors, or what `torch.save` wrote, tensors only.

    Raises:
        InputFileError: if there is no such file, it is of another kind, or holds more than tensors.
    """
    if path.suffix not in SUFFIXES:
        raise InputFileError(f"weights {path} are of no known kind; give one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputFileError(f"weights {path} do not exist; give a file that is there")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputFileError(
            f"weights {path} are a pickle that holds more than tensors; its code is never run: save its state_dict() where you "
            "trust it"
        ) from None
    except Exception as error:  # of safetensors, zipfile and torch
        raise InputFileError(f"weights {path} cannot be read: {first_line(error)}") from None
    while isinstance(content, dict) and (inner := next((key for key in _NESTED if key in content), None)):
        content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputFileError(f"weights {path} hold no tensors by name; save the model's state_dict()")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def fit_weights(model: nn.Module, weights: dict[str, Tensor], path: Path, name: str) -> None:
    """Put weights into a model, all of them and no others.

    Raises:
        ModelSourceError: naming three that are missing and three that are too many, or the first of another shape.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in weights and not key.endswith(_TRAINING_ONLY)]
    unexpected = [key for key in weights if key not in expected and not key.endswith(_TRAINING_ONLY)]
    if missing or unexpected:
        parts = [_list(what, keys) for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise ModelSourceError(
            f"the weights of {path} do not fit {name}: {'; '.join(parts)}; give the weights of this model"
        )
    for key, tensor in expected.items():
        if key in weights and weights[key].shape != tensor.shape:
            raise ModelSourceError(
                f"the weights of {path} do not fit {name}: {key} is {list(weights[key].shape)}, but {list(tensor.shape)} is needed"
            )
    model.load_state_dict({key: weights[key] for key in expected if key in weights}, strict=False)


def _list(what: str, keys: list[str]) -> str:
    more = ", ..." if len(keys) > _NAMES_SHOWN else ""
    return f"{len(keys)} {what} ({', '.join(keys[:_NAMES_SHOWN])}{more})"
