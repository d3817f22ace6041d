"""The attention blocks of a model that calls PyTorch's attention functions, from watching it run once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

from torch import nn

from fna.errors import UnsupportedAttentionError
from fna.patching.record import AttentionBlock, Entering
from fna.patching.survey import CallSite, Example, Survey, survey
from fna.patching.towers import name_towers
from fna.special_tokens import detect_prefix_tokens

_NONE = "{} has no self-attention block that can be FNA"
_MOST_PREFIX = 8
"""Prefix tokens that are looked for where neither a feature map nor the model tells: a class token and seven registers."""
_NUMBERED = re.compile(r"(^|_)\d+$")
_NAMED_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_USUAL = ("linear", "layer_norm", "dropout", "softmax", "gelu", "relu", "conv", "Tensor.")


def find_called_blocks(model: nn.Module, example: Example = None) -> list[AttentionBlock]:
    """List the attention blocks of a model in the order in which they run, those included that cannot be FNA.

    Args:
        model: any PyTorch model.
        example: what it is called with; None is images of the size that its attributes name.

    Raises:
        ModelSourceError: if the model does not run on that.
        UnsupportedAttentionError: if there are none, or if none of them can be FNA.
    """
    seen = survey(model, example)
    if not seen.sites:
        raise UnsupportedAttentionError(_say_why_unseen(model, seen))
    modules = dict(model.named_modules())
    maps: dict[str, tuple[tuple[int, int] | None, int | None]] = {}
    blocks = []
    paths = _tower_paths(seen.sites)
    names = name_towers(paths)
    for number, (site, path) in enumerate(zip(seen.sites, paths, strict=True)):
        feature_map, images = maps.setdefault(path, (site.patches, site.images))
        frames = _count_frames(site, images)
        refusal = _refuse_windows(site, images, seen.entered.get(site.path, ())) or site.refusal
        named = _named_prefix(site, model, modules)
        tokens = site.query[-2] // frames if site.query else 0
        patches, prefix = _find_grid(tokens, feature_map, None if refusal else seen.image, named)
        layer, entering = _find_layer(site, seen)
        known = len(site.query) == 4
        blocks.append(
            AttentionBlock(
                number=number,
                name=site.path + (f"#{site.ordinal}" if site.ordinal else ""),
                attention=modules[site.path],
                layer=modules[layer],
                tower=model,
                refusal=refusal,
                prefix_tokens=prefix,
                heads=site.query[1] if known else 0,
                head_size=site.query[3] if known else 0,
                tokens=site.query[2] if known else 0,
                entering=entering,
                patches=patches,
                tower_name=names[path],
                frames=frames,
                call=site.ordinal,
                runs=site.calls,
            )
        )
    if all(block.refusal for block in blocks):
        alike = ", and so for all" if len({block.refusal for block in blocks}) == 1 else "; attention in all:"
        raise UnsupportedAttentionError(
            f"{_NONE.format(type(model).__name__)}: block 0 ({blocks[0].name}): {blocks[0].refusal}{alike} {len(blocks)}"
        )
    return blocks


def _tower_paths(sites: Sequence[CallSite]) -> list[str]:
    """The path of the stack that each site is in: up to the first part that is a number, else the stack before it."""
    paths: list[str] = []
    for site in sites:
        parts = site.path.split(".")
        first = next((place for place, part in enumerate(parts) if _NUMBERED.search(part)), None)
        paths.append(".".join(parts[:first]) if first is not None else paths[-1] if paths else site.path)
    return paths


def _count_frames(site: CallSite, images: int | None) -> int:
    """How many images' tokens are joined in one sequence."""
    if images is None or len(site.query) != 4 or images % site.query[0] or site.query[2] % (images // site.query[0]):
        return 1
    return images // site.query[0]


def _refuse_windows(site: CallSite, images: int | None, entered: Sequence[int]) -> str | None:
    if images is None or not site.query:
        return None
    batch, tokens = site.query[0], site.query[-2]
    if len(site.query) == 5:
        batch *= site.query[1]
    elif len(site.query) == 3:  # heads may be in its batch; what the module was given has them not
        batch = entered[0] if prod(entered[1:-1]) == tokens else images
    if batch > images:
        return f"it attends within windows ({batch // images} of {tokens} tokens for each image)"
    return None


def _find_grid(
    tokens: int, feature_map: tuple[int, int] | None, image: tuple[int, int] | None, named: int
) -> tuple[tuple[int, int] | None, int]:
    """Rows and columns of patches, and how many of an image's tokens are none.

    Args:
        tokens: of one image; 0 where they are not known.
        feature_map: what the last convolution before the first block of a tower wrote; None where there was none.
        image: height and width of the input; where the feature map does not fit, patches that divide it evenly are looked for.
            None: they are not.
        named: prefix tokens by the model's own attributes and parameters.
    """
    if feature_map is not None and 0 <= tokens - prod(feature_map) < prod(feature_map):
        return feature_map, tokens - prod(feature_map)
    height, width = image or (0, 0)
    sides = [side for side in range(2, min(height, width) + 1) if height % side == width % side == 0]
    grids = [(height // side, width // side) for side in sides]
    for prefix in dict.fromkeys((named, *range(_MOST_PREFIX + 1))):
        for grid in grids:
            if prefix < prod(grid) == tokens - prefix:
                return grid, prefix
    return feature_map, named


def _named_prefix(site: CallSite, model: nn.Module, modules: dict[str, nn.Module]) -> int:
    """Prefix tokens by what the nearest module says of itself, else by the model's parameters."""
    parts = site.path.split(".")
    for end in range(len(parts), -1, -1):
        count = getattr(modules[".".join(parts[:end])], "num_prefix_tokens", None)
        if isinstance(count, int):
            return count
    return detect_prefix_tokens(model)


def _find_layer(site: CallSite, seen: Survey) -> tuple[str, Entering | None]:
    """The outermost module around a site that holds no other and is given all tokens, and how; else the module itself."""
    parts = site.path.split(".") if site.path else []
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        inside = {other.path for other in seen.sites if f"{other.path}.".startswith(f"{path}.")}
        entering = _how_tokens_enter(seen.entered.get(path), site.query)
        if inside == {site.path} and entering is not None:
            return path, entering
    return site.path, None


def _how_tokens_enter(shape: Sequence[int] | None, query: Sequence[int]) -> Entering | None:
    if shape is None or len(query) != 4:
        return None
    batch, tokens = query[0], query[2]
    if len(shape) == 3 and tuple(shape[:2]) == (batch, tokens):
        return "tokens"
    if len(shape) == 3 and tuple(shape[:2]) == (tokens, batch):
        return "tokens first"
    return "map" if len(shape) == 4 and shape[0] == batch and prod(shape[1:3]) == tokens else None


def _say_why_unseen(model: nn.Module, seen: Survey) -> str:
    none = _NONE.format(type(model).__name__)
    suspects = [path for path in seen.called if _NAMED_ATTENTION.search(path.rpartition(".")[2])]
    if not suspects:
        return (
            f"{none} (no module called torch.nn.functional.scaled_dot_product_attention or computed softmax(q @ k.T) @ v); choose a "
            "Vision Transformer"
        )
    path = suspects[0]
    called = sorted(seen.called[path], key=lambda function: (function.startswith(_USUAL), function))
    return (
        f"{none} ({path} called {', '.join(called[:4])} and not torch.nn.functional.scaled_dot_product_attention); have it call that "
        "function, or export the model to ONNX and use fna graft"
    )
