"""Finding the self-attention blocks of a vision model, and saying why one cannot be FNA."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fna.errors import FnaError, ModelSourceError, UnsupportedAttentionError
from fna.patching.called_blocks import find_called_blocks
from fna.patching.record import BLOCKS, PATCH, AttentionBlock, Entering
from fna.patching.survey import Example
from fna.patching.towers import name_towers
from fna.special_tokens import detect_prefix_tokens

_NO_MODULES = "it has no attention modules"


def find_attention_blocks(model: nn.Module, example: Example = None) -> list[AttentionBlock]:
    """List the self-attention blocks of a vision model, those included that cannot be FNA.

    Blocks are found by transformers' attention interface where a model has it; any other model is run once, and its calls of
    PyTorch's attention functions are watched.

    Args:
        model: a vision model.
        example: what a model without the attention interface is called with; None is images of the size that its attributes name.

    Raises:
        ModelSourceError: if a model without the attention interface does not run on that.
        UnsupportedAttentionError: if there are none, or if none of them can be FNA.
    """
    patched: list[AttentionBlock] = getattr(getattr(model, PATCH, None), "blocks", [])
    if any(block.call is not None for block in patched):  # their calls cannot be seen any more
        return patched
    if example is None and hasattr(model, BLOCKS):
        return list(getattr(model, BLOCKS))
    towers: dict[str, list[AttentionBlock]] = {}
    for name, attention in model.named_modules():
        if not _uses_attention_interface(attention):
            continue
        tower = _find_tower(model, name)
        if tower is None:
            continue
        path, layer = _enclosing_layer(model, name)
        blocks = towers.setdefault(path, [])
        refusal = _find_refusal(attention, layer, tower) or _refuse_queries(attention, len(blocks))
        prefix = blocks[0].prefix_tokens if blocks else _count_prefix(model, name, tower)
        sizes = _head_sizes(attention.config)
        frames = 1 if refusal else _count_windows(layer)
        # A layer of windows is given them one by one, and joins them itself.
        entering: Entering | None = "tokens" if frames == 1 else None
        blocks.append(
            AttentionBlock(
                len(blocks), name, attention, layer, tower, refusal, prefix, *sizes, entering=entering, frames=frames
            )
        )
    if not towers:
        return _find_without_interface(model, example)
    blocks = [block for stack in towers.values() for block in stack]
    if len(towers) > 1 and all(block.refusal for block in blocks):
        raise UnsupportedAttentionError(_say_why_none_of_several(model, blocks))
    names = name_towers(towers)
    owners = [names[path] for path, stack in towers.items() for _ in stack]
    return [
        replace(block, number=number, tower_name=owner)
        for number, (block, owner) in enumerate(zip(blocks, owners, strict=True))
    ]


def keep_blocks(wrapper: nn.Module, blocks: Sequence[AttentionBlock]) -> None:
    """Have `find_attention_blocks(wrapper)` return the blocks found in the model that it holds, by their paths in the wrapper.

    For a wrapper that nobody changes: what is found once is not looked for again.
    """
    paths = {module: path for path, module in wrapper.named_modules()}
    renamed = [replace(block, name="#".join((paths[block.attention], *block.name.split("#")[1:]))) for block in blocks]
    setattr(wrapper, BLOCKS, renamed)


def _find_without_interface(model: nn.Module, example: Example) -> list[AttentionBlock]:
    from transformers import PreTrainedModel

    try:
        return find_called_blocks(model, example)
    except FnaError as error:
        reason = _say_why_none(model)
        unknown = isinstance(error, ModelSourceError) and _NO_MODULES in reason
        if unknown or any(isinstance(module, PreTrainedModel) for module in model.modules()):
            raise UnsupportedAttentionError(reason) from None
        raise


def _head_sizes(config: Any) -> tuple[int, int]:
    """H and D of an attention's configuration; 0 where it does not say them, or they differ from stage to stage."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0, 0
    return heads, int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _find_refusal(attention: nn.Module, layer: nn.Module, tower: nn.Module | None = None) -> str | None:
    names = {name.rsplit(".", 1)[-1] for name, _ in (*layer.named_modules(), *layer.named_parameters())}
    if getattr(attention, "is_causal", False):
        return "it is causal"
    if getattr(attention, "num_key_value_groups", 1) > 1:
        return "its key and value heads are grouped"
    if getattr(attention, "is_cross_attention", False) or any("cross" in part for part in _name_parts(attention)):
        return "it is cross-attention"
    if any("cross" in name or "encoder_attn" in name for name, _ in layer.named_children()):
        return "it attends among a decoder's queries, which are no tokens of an image"
    for holder in (attention, layer):
        if getattr(holder, "window_size", 0) or getattr(holder, "sliding_window", 0):
            return "it attends within windows"
    if _count_windows(layer) > 1 and not getattr(layer, "global_attention", True):
        return "it attends within windows"
    if any("relative_position" in name or name.startswith("rel_pos") for name in names):
        return "it adds a relative position bias to the scores"
    if tower is not None and any("relative_position" in name for name, _ in tower.named_parameters()):
        return "its model adds a shared relative position bias to the scores"
    return None


def _refuse_queries(attention: nn.Module, number: int) -> str | None:
    """Refuse the last blocks of a model that puts its queries before the tokens there (EoMT)."""
    config = attention.config
    last = getattr(config, "num_blocks", 0) if hasattr(config, "num_queries") else 0
    if last and number >= config.num_hidden_layers - last:
        return f"its model puts {config.num_queries} queries before the tokens of its last {last} blocks"
    return None


def _count_windows(layer: nn.Module) -> int:
    """Windows whose tokens, each window with a class token of its own, follow one another where attention is global (RF-DETR)."""
    return int(getattr(layer, "num_windows", 1)) ** 2


def _name_parts(module: nn.Module) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"([A-Z])", r" \1", type(module).__name__).lower())


def _uses_attention_interface(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def _parents(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that contain `name`, the nearest first, the model itself last."""
    while name:
        name = name.rpartition(".")[0]
        yield name, model.get_submodule(name)


def _find_tower(model: nn.Module, name: str) -> nn.Module | None:
    """Return the outermost model around a module that still takes images only, or None for modules of text models."""
    from transformers import PreTrainedModel

    tower = None
    for _, parent in _parents(model, name):
        if isinstance(parent, PreTrainedModel):
            if parent.main_input_name != "pixel_values":
                break
            tower = parent
    return tower


def _count_prefix(model: nn.Module, name: str, tower: nn.Module) -> int:
    """Prefix tokens of the nearest module around a stack that has any, up to its tower: several stacks have each their own."""
    for _, parent in _parents(model, name):
        count = detect_prefix_tokens(parent)
        if count or parent is tower:
            return count
    return 0


def _enclosing_layer(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the path of the module list that holds the block, and the block's layer in it."""
    layer = model.get_submodule(name)
    for path, parent in _parents(model, name):
        if isinstance(parent, nn.ModuleList):
            return path, layer
        layer = parent
    return name.rpartition(".")[0], model.get_submodule(name.rpartition(".")[0])


def _say_why_none(model: nn.Module) -> str:
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if name and any(part in ("attention", "attn") for part in _name_parts(module)):
            refusal = _find_refusal(module, _enclosing_layer(model, name)[1])
            reasons[name] = refusal or "it does not use transformers' attention interface on images"
    if not reasons:
        seen = _NO_MODULES
    else:
        telling = (name for name, reason in reasons.items() if "interface" not in reason)
        name = next(telling, next(iter(reasons)))
        seen = f"the first, block 0 ({name}): {reasons[name]}; {len(reasons)} attention modules in all"
    return (
        f"{type(model).__name__} has no self-attention block that can be FNA ({seen}); "
        "choose a plain Vision Transformer, or export the model to ONNX and use fna graft"
    )


def _say_why_none_of_several(model: nn.Module, blocks: list[AttentionBlock]) -> str:
    return (
        f"{type(model).__name__} has no self-attention block that can be FNA: block 0 ({blocks[0].name}): "
        f"{blocks[0].refusal}, and so for all {len(blocks)}; choose a plain Vision Transformer"
    )
