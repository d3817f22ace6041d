"""Vision models of timm, open_clip and torchvision, by `library:name`, and how each takes photographs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fna.errors import FnaError, MissingCapabilityError, ModelSourceError, first_line
from fna.export.preprocessing import Preprocessing
from fna.export.sources.model_names import ModelName
from fna.export.sources.weights import fit_weights, read_weights

_PACKAGES = {"timm": "timm", "open_clip": "open_clip_torch", "torchvision": "torchvision"}
LIBRARIES = tuple(_PACKAGES)
"""What stands before the colon in a model's name, for models of a library."""


@dataclass(frozen=True)
class LibraryModel:
    """A model of a library.

    Attributes:
        module: takes images.
        preprocessing: of the library's own configuration.
        output: what its output is, where that is one tensor.
    """

    module: nn.Module
    preprocessing: Preprocessing
    output: str = "output"


class FeatureModel(nn.Module):
    """A timm model without a classifier: its final tokens, and what it pools of them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
    ) -> dict[str, Tensor]:
        """Return `last_hidden_state` `[B, N, C]` and `pooler_output` `[B, C]`."""
        tokens = self.model.forward_features(pixel_values)
        return {"last_hidden_state": tokens, "pooler_output": self.model.forward_head(tokens)}


def load_from_library(name: ModelName, written: str) -> LibraryModel:
    """Load a library's model, with its trained weights, those of a file, or (`pretrained=False`) random ones.

    Args:
        name: what is before the colon is one of `LIBRARIES`.
        written: the name as the user wrote it, for errors.

    Raises:
        MissingCapabilityError: if the library is not installed.
        ModelSourceError: if it has no such model, refuses an argument, or the weights cannot be had.
    """
    library = _import(name.source)
    arguments = dict(name.arguments)
    trained = arguments.pop("pretrained", name.weights is None)
    load: dict[str, Callable[..., LibraryModel]] = {
        "timm": _load_timm,
        "open_clip": _load_open_clip,
        "torchvision": _load_torchvision,
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same when validation loads them again
            loaded = load[name.source](library, name.model, trained, arguments)
    except FnaError:
        raise
    except Exception as error:  # of the library, of its arguments, of the network
        way_out = "; give --weights FILE, or pretrained=False for random ones" if trained else ""
        raise ModelSourceError(
            f"{name.source} cannot make {written}: {type(error).__name__}: {first_line(error)}{way_out}"
        ) from error
    if name.weights is not None:
        inner: Any = loaded.module.model if isinstance(loaded.module, FeatureModel) else loaded.module
        weights = read_weights(name.weights)
        filtered = getattr(sys.modules[type(inner).__module__], "checkpoint_filter_fn", None)
        if name.source == "open_clip":
            weights = {
                key.removeprefix("visual."): weight for key, weight in weights.items() if _is_vision(key, weights)
            }
        fit_weights(inner, weights if filtered is None else filtered(weights, inner), name.weights, written)
    return loaded


def _is_vision(key: str, weights: dict[str, Tensor]) -> bool:
    """Whether a weight is the vision tower's, in a file of both towers."""
    return key.startswith("visual.") or not any(other.startswith("visual.") for other in weights)


def _import(source: str) -> Any:
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name != source:
            raise ModelSourceError(f"{source} cannot be imported: {first_line(error)}") from None
        raise MissingCapabilityError(
            f"models of {source} need the Python package {_PACKAGES[source]}, which is not installed; install it with pip"
        ) from None
    except Exception as error:  # such as a torchvision built for another PyTorch
        raise ModelSourceError(f"{source} cannot be imported: {first_line(error)}") from None


def _load_timm(timm: Any, name: str, trained: bool, arguments: dict[str, Any]) -> LibraryModel:
    def make(**more: Any) -> Any:
        return timm.create_model(name, pretrained=trained, **arguments, **more)

    try:
        model = make(dynamic_img_size=True)  # other image sizes than its own
    except TypeError:
        model = make()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    settings = timm.data.resolve_model_data_config(model)
    preprocessing = _preprocessing(settings["mean"], settings["std"], settings["interpolation"])
    if model.num_classes:
        return LibraryModel(model, preprocessing, "logits")
    return LibraryModel(FeatureModel(model), preprocessing)


def _load_open_clip(open_clip: Any, name: str, trained: bool | str, arguments: dict[str, Any]) -> LibraryModel:
    if trained is True:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ModelSourceError(
            f"open_clip has {len(tags)} sets of weights for {name!r}; give open_clip:{name},pretrained=TAG with one of "
            f"{', '.join(tags[:6]) or 'none'}, or --weights FILE"
        )
    model = open_clip.create_model(name, pretrained=trained or None, **arguments)
    settings = open_clip.get_model_preprocess_cfg(model)
    preprocessing = _preprocessing(settings["mean"], settings["std"], settings.get("interpolation", "bicubic"))
    return LibraryModel(model.visual, preprocessing, "image_embeds")


def _load_torchvision(torchvision: Any, name: str, trained: bool, arguments: dict[str, Any]) -> LibraryModel:
    entry = torchvision.models.get_model_weights(name).DEFAULT
    model = torchvision.models.get_model(name, weights=None, **arguments)
    if trained:
        model.load_state_dict(entry.get_state_dict(progress=False, check_hash=True, weights_only=True))
    settings = entry.transforms()
    return LibraryModel(model, _preprocessing(settings.mean, settings.std, settings.interpolation.value), "logits")


def _preprocessing(mean: Any, std: Any, resize: Any) -> Preprocessing:
    return Preprocessing(mean=tuple(mean), std=tuple(std), resize="bicubic" if resize == "random" else resize)
