"""Where models come from: the built-in list, a transformers id or folder, another library, or a Python factory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fna.errors import ModelSourceError, first_line
from fna.export.preprocessing import Preprocessing
from fna.export.sources.dino_saliency import BUILT_IN, load_dino_saliency
from fna.export.sources.factory import call_factory
from fna.export.sources.libraries import LIBRARIES, load_from_library
from fna.export.sources.model_names import parse_model_name
from fna.export.sources.transformers_models import find_preprocessing, load_transformers
from fna.export.sources.vision_modules import PatchifiedVision, ProjectedTokens, VisionOutputs
from fna.patching import AttentionBlock, find_attention_blocks
from fna.patching.blocks import keep_blocks
from fna.patching.survey import guess_input
from fna.patching.towers import number_towers

DEFAULT_MODEL = BUILT_IN[0]

_USUAL_PATCH = 16

_OUTPUT_FIELDS = (
    "logits",
    "pred_boxes",
    "class_queries_logits",
    "masks_queries_logits",
    "heatmaps",
    "predicted_depth",
    "field_of_view",
    "image_features",
    "image_embeds",
    "last_hidden_state",
    "pooler_output",
    "feature_maps",
)
_TOKEN_FIELDS = ("last_hidden_state", "image_features")


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
        native_size: height and width of the images that the model was made for.
        any_resolution: whether the model takes other sizes than the native one.
        num_blocks: attention blocks of its vision tower.
        preprocessing: how photographs become its input.
        open_size: whether it can be traced with height and width left open.
        towers: the block numbers of each of its towers; none for a model of one tower. See `fna.block_numbers.parse_layers`.
        frames: images of a scene that it takes at once, `[B, frames, 3, H, W]`; None where it takes one, `[B, 3, H, W]`.
    """

    name: str
    module: nn.Module
    output_names: tuple[str, ...]
    token_outputs: tuple[str, ...]
    map_outputs: tuple[str, ...]
    patch_size: int
    native_size: tuple[int, int]
    any_resolution: bool
    num_blocks: int
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    open_size: bool = True
    towers: dict[str, str] = field(default_factory=dict)
    frames: int | None = None

    @property
    def native_resolution(self) -> int:
        """The side of the square images that a model was made for; the height, where they are none."""
        return self.native_size[0]

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of the patches of one image."""
        return height // self.patch_size, width // self.patch_size

    def input_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one input."""
        return (3, height, width) if self.frames is None else (self.frames, 3, height, width)


def load_model(name: str) -> LoadedModel:
    """Load a model by a built-in name, a transformers model id or local folder, `library:name`, or `module.path:factory`.

    Behind the latter two there may be arguments, and `weights=FILE`: see `fna.export.sources.model_names`.

    Weights are read through safetensors or `torch.load(weights_only=True)` only, and no code from a model repository runs.

    Raises:
        ModelSourceError: if there is no such model, it cannot be loaded, or has no vision transformer in it.
        InputFileError: if the file of weights cannot be read.
        MissingCapabilityError: if the library is not installed.
        UnsupportedAttentionError: if none of its attention blocks can be found.
    """
    if name in BUILT_IN:
        return _built_in(name)
    if (":" in name or "," in name) and not Path(name).exists():
        called = parse_model_name(name)
        if ":" not in name.split(",")[0]:
            raise ModelSourceError(
                f"model {name!r} has arguments behind a comma, which {called.source} does not take; models of "
                f"{', '.join(LIBRARIES)} and factories, module.path:function, take them"
            )
        if called.source in LIBRARIES:
            found = load_from_library(called, name)
            return wrap_model(name, found.module, preprocessing=found.preprocessing, output=found.output)
        return wrap_model(name, call_factory(called))
    return wrap_model(name, *load_transformers(name))


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
    if not model.any_resolution and (height, width) != model.native_size:
        rows, columns = model.native_size
        raise ModelSourceError(f"{model.name} takes {rows}x{columns} images only, but {height}x{width} was asked for")


def _built_in(name: str) -> LoadedModel:
    module = load_dino_saliency()
    return LoadedModel(
        name=name,
        module=module,
        output_names=("saliency", "tokens"),
        token_outputs=("tokens",),
        map_outputs=("saliency",),
        patch_size=14,
        native_size=(518, 518),
        any_resolution=True,
        num_blocks=len(find_attention_blocks(module)),
    )


def wrap_model(
    name: str,
    model: nn.Module,
    missing: tuple[str, ...] = (),
    preprocessing: Preprocessing | None = None,
    output: str = "output",
) -> LoadedModel:
    """Find the vision tower, probe which outputs it has, and wrap it to take and return plain tensors.

    `output` is the name of the output where there is one tensor.
    """
    model.eval()
    blocks = find_attention_blocks(model)
    tower = _vision_part(model, blocks[0].tower)
    absent = _check_missing(name, missing)
    frames = _count_frames(model)
    native, patch = _image_sizes(model, next((b for b in blocks if b.patches and not b.refusal), blocks[0]))
    shape = (3, *native) if frames is None else (frames, 3, *native)
    arguments = _forward_arguments(tower)
    fields = tuple(field for field in _probe_fields(name, tower, arguments, shape, output) if field not in absent)
    if absent and not fields:
        raise ModelSourceError(
            f"model {name!r} has no trained weights for any of its outputs: {', '.join(missing[:3])}"
        )
    wrapped = VisionOutputs(tower, fields, arguments, shape)
    keep_blocks(wrapped, blocks)
    names, tokens, maps = _classify(wrapped, fields, shape, (native[0] // patch) * (native[1] // patch))
    any_resolution = _takes_any_resolution(wrapped, shape, patch)
    if preprocessing is None:
        preprocessing = find_preprocessing(name)
    return LoadedModel(
        name=name,
        module=wrapped,
        output_names=names,
        token_outputs=tokens,
        map_outputs=maps,
        patch_size=patch,
        native_size=native,
        any_resolution=any_resolution,
        num_blocks=len(blocks),
        preprocessing=preprocessing if frames is None else preprocessing.model_copy(update={"frames": frames}),
        # SigLIP 2's resize weights are made for one size; the exporter would bake that size in and not say so
        open_size=any_resolution and frames is None and not isinstance(tower, PatchifiedVision),
        towers=number_towers([block.tower_name for block in blocks]),
        frames=frames,
    )


def _count_frames(model: nn.Module) -> int | None:
    """How many images a model takes at once, by its attribute `example_shape`: (frames, 3, H, W)."""
    shape: Sequence[int] = getattr(model, "example_shape", ())
    return int(shape[0]) if len(shape) == 4 else None


def _image_sizes(model: nn.Module, block: AttentionBlock) -> tuple[tuple[int, int], int]:
    """Height and width of the images that a model was made for, and the side of its patches, in pixels."""
    if block.call is None:
        config = block.attention.config
        patch = _two(getattr(config, "patch_size", 16))[0]
        return _native_size(getattr(model, "config", None), config, patch), patch
    height, width = guess_input(model).shape[-2:]
    return (height, width), height // block.patches[0] if block.patches else _USUAL_PATCH


def _check_missing(name: str, missing: tuple[str, ...]) -> tuple[str, ...]:
    """Return the outputs that cannot be trusted because a checkpoint lacks their weights; refuse where that is all of them.

    Checkpoints without a pooler are common (ViT trained by DINO); transformers would fill it with random numbers.
    """
    others = [key for key in missing if "pooler." not in key]
    if others:
        raise ModelSourceError(
            f"the checkpoint of model {name!r} lacks {len(others)} weights, first: {others[0]}; they would be random numbers, "
            "so give a complete checkpoint"
        )
    return ("pooler_output",) if missing else ()


def _vision_part(model: nn.Module, tower: nn.Module) -> nn.Module:
    """The whole model where images are all it takes; otherwise (CLIP, LLaVA) its vision tower, with LLaVA's projector."""
    part = model if getattr(model, "main_input_name", "pixel_values") == "pixel_values" else tower
    if type(part).__name__ == "Siglip2VisionModel":
        return PatchifiedVision(part).eval()
    inner: Any = getattr(model, "model", model)
    if type(inner).__name__ == "LlavaModel" and inner.vision_tower is part:
        layers = inner.config.vision_feature_layer
        chosen = [layers] if isinstance(layers, int) else list(layers)
        keep_class_token = inner.config.vision_feature_select_strategy == "full"
        return ProjectedTokens(part, inner.multi_modal_projector, chosen, keep_class_token).eval()
    return part


def _forward_arguments(model: nn.Module) -> dict[str, Any]:
    takes = model.tower if isinstance(model, ProjectedTokens) else model
    names = inspect.signature(type(takes).forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}


def _probe_fields(
    name: str, model: nn.Module, arguments: dict[str, Any], shape: tuple[int, ...], single: str
) -> tuple[str, ...]:
    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, *shape), **arguments)
    except Exception as error:
        raise ModelSourceError(
            f"model {name!r} does not run on one {shape[-2]}x{shape[-1]} image: {first_line(error)}"
        ) from None
    if isinstance(output, Tensor):
        return (single,)
    if isinstance(output, (tuple, list)) and output and all(isinstance(value, Tensor) for value in output):
        return tuple(f"output_{index}" for index in range(len(output)))
    given = dict(output) if hasattr(output, "keys") else {}
    fields = tuple(key for key in _OUTPUT_FIELDS if given.get(key) is not None)
    fields = fields or tuple(key for key, value in given.items() if isinstance(key, str) and _is_real(value))
    if not fields:
        raise ModelSourceError(
            f"model {name!r} returns a {type(output).__name__} without any of {', '.join(_OUTPUT_FIELDS)}; "
            "give a factory whose module returns a tensor, a tuple or a dict of tensors or one of transformers' output classes"
        )
    return fields


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _classify(
    wrapped: nn.Module, fields: tuple[str, ...], shape: tuple[int, ...], patches: int
) -> tuple[tuple[str, ...], ...]:
    with torch.inference_mode():
        tensors = wrapped(torch.zeros(1, *shape))
    plain = [field for field in fields if field != "feature_maps"]
    names = plain + [f"feature_map_{index}" for index in range(len(tensors) - len(plain))]
    named = [(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
    size = shape[-2:]
    maps = tuple(
        name
        for name, tensor in named
        if name == "predicted_depth" or (name not in _OUTPUT_FIELDS and tuple(tensor.shape[1:]) in (size, (1, *size)))
    )
    tokens = tuple(
        name
        for name, tensor in named
        if tensor.dim() == 3
        and name not in maps
        and (name not in _OUTPUT_FIELDS or name in _TOKEN_FIELDS)
        and tensor.shape[1] >= patches  # a decoder's queries are none
    )
    return tuple(names), tokens, maps


def _takes_any_resolution(wrapped: nn.Module, shape: tuple[int, ...], patch: int) -> bool:
    *front, height, width = shape
    try:
        with torch.inference_mode():
            wrapped(torch.zeros(1, *front, height + 2 * patch, width + 2 * patch))
    except Exception:  # any failure means the same: this size is not for this model
        return False
    return True


def _native_size(whole: Any, config: Any, patch: int) -> tuple[int, int]:
    """Height and width by the configuration of the whole model, or of its tower."""
    if hasattr(whole, "scaled_images_ratios"):  # DepthPro: its smallest scale is one patch of its encoder's size
        return _two(round(whole.patch_size / min(whole.scaled_images_ratios)))
    if hasattr(config, "image_size"):
        return _two(config.image_size)
    if hasattr(config, "num_patches"):  # SigLIP 2: a square grid of positions
        return _two(math.isqrt(config.num_patches) * patch)
    return _two(patch * 16)


def _two(value: Any) -> tuple[int, int]:
    """Height and width, of both or of one number for both."""
    height, width = value if isinstance(value, (tuple, list)) else (value, value)
    return int(height), int(width)
