"""FNA inside transformers' vision models, by their own switch: the attention implementation named `fna`.

`patch` sets a model up by a plan and `unpatch` undoes all of it. No module is replaced and no weight touched: each chosen
attention module is told its part of the plan, the vision config's attention implementation becomes `fna`, and hooks on the
layers choose landmarks from the hidden states where a sampler needs them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fna.attention import fast_nystrom_attention
from fna.composition import compose_heads, correct
from fna.errors import InvalidPlanError, UnsupportedAttentionError
from fna.plan import BlockPlan, MaskPlan, Plan, SharingKey, TokenRange
from fna.samplers import LandmarkRequest, find_sampler, landmark_bias
from fna.samplers.common.roles import guided_landmarks
from fna.samplers.common.spacing import patch_grid
from fna.special_tokens import detect_prefix_tokens, listed_tokens_mask

ATTENTION_NAME = "fna"
_STATE = "_fna_block"
_EXACT = "_fna_exact"
_CHOICE = "_fna_choice"
_PATCH = "_fna_patch"
_MASK = "_fna_mask"
_MASSIVE = "_fna_massive"
_ARTIFACT = "_fna_artifact"


@dataclass(frozen=True)
class AttentionBlock:
    """One attention block of a vision model, as found by `find_attention_blocks`.

    Attributes:
        number: its place among the blocks, from 0.
        name: its module path in the model.
        attention: the attention module.
        layer: the transformer layer that holds it; the hidden states `[B, N, C]` that enter it are the residual stream.
        tower: the vision model that it belongs to.
        refusal: why it cannot be FNA, or None.
    """

    number: int
    name: str
    attention: nn.Module
    layer: nn.Module
    tower: nn.Module
    refusal: str | None


@dataclass
class _Finder:
    """Finds massive or artifact tokens at one layer or attention module; all that ask for them share it."""

    tokens: Literal["artifact", "massive"]
    prefix_tokens: int
    mask: Tensor | None = None  # [B, N], of the run that is under way


@dataclass
class _Tokens:
    """Tokens that a plan names: listed, or found."""

    entry: TokenRange
    finder: _Finder | None

    def mask(self, num_tokens: int, device: torch.device) -> Tensor:  # [B, N] or [1, N], int32
        """Which tokens these are, once the block that finds them was entered."""
        if isinstance(self.entry.tokens, tuple):
            return listed_tokens_mask(self.entry.tokens, num_tokens, device)
        assert self.finder is not None
        assert self.finder.mask is not None
        return self.finder.mask


@dataclass
class _BlockState:
    """What an attention module needs to know to run as FNA; blocks that share landmarks share `chosen`."""

    name: str
    entry: BlockPlan
    plan: Plan
    prefix_tokens: int
    chooses: bool
    key: SharingKey
    chosen: dict[SharingKey, tuple[Tensor, Tensor | None]]
    include: _Tokens | None = None
    exclude: _Tokens | None = None
    hidden: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _MaskState:
    """What an attention module needs to know to mask keys."""

    name: str
    entry: MaskPlan
    tokens: _Tokens


@dataclass
class _PatchRecord:
    """What `unpatch` needs to undo a patch."""

    configs: list[tuple[Any, str | None]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str]] = field(default_factory=list)


def patch(model: nn.Module, plan: Plan) -> list[AttentionBlock]:
    """Make the blocks that `plan` lists compute Fast Nyström Attention, in place.

    Args:
        model: any module that contains one vision transformer of the transformers library (ViT, DeiT, DINOv2, DINOv3, CLIP,
            SigLIP and others that use its attention interface); text towers and language models are left alone.
        plan: which blocks, how many landmarks, chosen how.

    Returns:
        All attention blocks of the model's vision tower, in order.

    Raises:
        InvalidPlanError: if the plan was made for another number of blocks, or the model is patched already.
        UnsupportedAttentionError: if the model has no block that could be FNA, or the plan lists one that cannot, by name.
    """
    if hasattr(model, _PATCH):
        raise InvalidPlanError("the model is patched already; call fna.unpatch(model) before patching it anew")
    blocks = find_attention_blocks(model)
    if len(blocks) != plan.num_blocks:
        raise InvalidPlanError(
            f"the plan is for a model of {plan.num_blocks} attention blocks, but this one has {len(blocks)}; "
            "make a plan for this model"
        )
    for block in blocks:
        planned, masked = plan.find(block.number) is not None, plan.find_mask(block.number) is not None
        if block.refusal is not None and (planned or masked):
            raise UnsupportedAttentionError(
                f"block {block.number} ({block.name}) cannot be {'FNA' if planned else 'masked'}: {block.refusal}; "
                f"take it out of the plan's {'layers' if planned else 'masks'}"
            )
    _register_with_transformers()
    record = _PatchRecord()
    try:
        _apply(blocks, plan, record)
    except BaseException:
        _undo(record)
        raise
    setattr(model, _PATCH, record)
    return blocks


def unpatch(model: nn.Module) -> None:
    """Undo `patch`, so that the model computes exactly what it did before. Does nothing for a model that is not patched."""
    record = getattr(model, _PATCH, None)
    if record is not None:
        _undo(record)
        delattr(model, _PATCH)


def find_attention_blocks(model: nn.Module) -> list[AttentionBlock]:
    """List the self-attention blocks of a model's vision tower, those included that cannot be FNA.

    Raises:
        UnsupportedAttentionError: if there are none, if none of several stages can be FNA, or if the model has more than one
            vision tower.
    """
    towers: dict[str, list[AttentionBlock]] = {}
    for name, attention in model.named_modules():
        if not _uses_attention_interface(attention):
            continue
        tower = _find_tower(model, name)
        if tower is None:
            continue
        path, layer = _enclosing_layer(model, name)
        blocks = towers.setdefault(path, [])
        refusal = _find_refusal(attention, layer, tower)
        blocks.append(AttentionBlock(len(blocks), name, attention, layer, tower, refusal))
    if not towers:
        raise UnsupportedAttentionError(_say_why_none(model))
    if len(towers) > 1:
        raise UnsupportedAttentionError(_say_why_several(model, towers))
    return next(iter(towers.values()))


def fna_attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [B, N, H, D]
    """The function registered as attention implementation `fna`; blocks that the plan leaves exact run as before the patch.

    Raises:
        UnsupportedAttentionError: if the block is called with a mask, a position bias, causally or as cross-attention.
    """
    state: _BlockState | None = getattr(module, _STATE, None)
    masking: _MaskState | None = getattr(module, _MASK, None)
    if state is None and masking is None:
        exact_name = getattr(module, _EXACT, "sdpa")
        return exact_attention_forward(
            exact_name, module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    name = state.name if state is not None else masking.name if masking is not None else ""
    _refuse_call(name, query, key, attention_mask, dropout, kwargs)
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    finder: _Finder | None = getattr(module, _ARTIFACT, None)
    if finder is not None:
        finder.mask = torch.ops.fna.artifact_tokens(query, key, factor, finder.prefix_tokens)
    key_mask = masking.tokens.mask(query.shape[2], query.device) if masking is not None else None
    sink = masking is not None and masking.entry.sink

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if key_mask is not None:
            return torch.ops.fna.masked_attention(query, key, value, key_mask, factor, sink)
        return scaled_dot_product_attention(query, key, value, scale=scaling)

    if state is None:
        return exact(query, key, value).transpose(1, 2), None
    landmarks, bias = _landmarks_for(state, query, key, value)

    def nystrom(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = fast_nystrom_attention(
            query,
            key,
            value,
            landmarks,
            landmark_bias=bias,
            scale=factor,
            iterations=state.plan.iterations_of(state.entry),
            exact_rows=state.plan.exact_rows,
            key_mask=key_mask,
            sink=sink,
        )
        return _corrected(state, out, value, landmarks)

    return compose_heads(query, key, value, state.entry.heads, nystrom, exact).transpose(1, 2), None


def _corrected(state: _BlockState, out: Tensor, value: Tensor, landmarks: Tensor) -> Tensor:
    correction = state.entry.correction
    if correction is None:
        return out
    if len(correction.gains) != out.shape[1]:
        raise InvalidPlanError(
            f"{state.name}: the correction has kernels for {len(correction.gains)} heads, but {out.shape[1]} are FNA"
        )
    return correct(
        out,
        value,
        landmarks,
        correction,
        prefix_tokens=state.prefix_tokens,
        patches=patch_grid(out.shape[2], state.prefix_tokens, state.plan.patches),
        exact_rows=state.plan.exact_rows,
    )


def exact_attention_forward(name: str, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Run the attention function of one of transformers' implementations; `eager` is the module's own file's."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":  # not in the registry
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[name]
    result: tuple[Tensor, Tensor | None] = attend(module, *args, **kwargs)
    return result


def _register_with_transformers() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, fna_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, make_mask)


def make_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Make no mask where nothing is masked, while tracing too (`sdpa_mask` writes one of ones into every traced file)."""
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and allow_is_bidirectional_skip:
        return None
    return sdpa_mask(
        *args, attention_mask=attention_mask, allow_is_bidirectional_skip=allow_is_bidirectional_skip, **kwargs
    )


def _apply(blocks: list[AttentionBlock], plan: Plan, record: _PatchRecord) -> None:
    prefix = plan.prefix_tokens if plan.prefix_tokens is not None else detect_prefix_tokens(blocks[0].tower)
    chosen: dict[SharingKey, tuple[Tensor, Tensor | None]] = {}
    seen: set[SharingKey] = set()
    finders: dict[tuple[str, int], _Finder] = {}

    def tokens_of(key: str, planned: tuple[int, TokenRange] | None) -> _Tokens | None:
        return None if planned is None else _find_at(key, *planned, blocks, prefix, finders, record)

    for entry in plan.blocks:
        block = blocks[entry.block]
        alone, key = plan.resamples(entry), plan.sharing_key(entry)
        chooses = alone or key not in seen
        if not alone:
            seen.add(key)
        shared = {} if alone else chosen
        name = f"block {block.number} ({block.name})"
        state = _BlockState(name, entry, plan, prefix, chooses, key, shared)
        state.include = tokens_of("landmarks_include", plan.find_landmark_range("include", entry.block))
        state.exclude = tokens_of("landmarks_exclude", plan.find_landmark_range("exclude", entry.block))
        _set(record, block.attention, _STATE, state)
        if chooses and entry.feature == "input" and find_sampler(entry.sampler).looks_at_features:
            _set(record, block.layer, _CHOICE, state)
            record.hooks.append(block.layer.register_forward_pre_hook(_choose_landmarks, with_kwargs=True))
    for block in blocks:
        mask = plan.find_mask(block.number)
        if mask is not None:
            tokens = tokens_of("masks", mask)
            assert tokens is not None
            state_of_mask = _MaskState(f"block {block.number} ({block.name})", mask[1], tokens)
            _set(record, block.attention, _MASK, state_of_mask)
    for block in blocks:
        if not hasattr(block.attention, _STATE):
            _set(record, block.attention, _EXACT, block.attention.config._attn_implementation or "sdpa")
    # All of them, exact blocks too: a traced model is then free of the masks of ones that transformers writes into it.
    for config in {id(block.attention.config): block.attention.config for block in blocks}.values():
        record.configs.append((config, config._attn_implementation))
        config._attn_implementation = ATTENTION_NAME


def _find_at(
    key: str,
    first: int,
    entry: TokenRange,
    blocks: list[AttentionBlock],
    prefix: int,
    finders: dict[tuple[str, int], _Finder],
    record: _PatchRecord,
) -> _Tokens:
    """Have the tokens of a range found at its first block, once for all that name them."""
    if isinstance(entry.tokens, tuple):
        return _Tokens(entry, None)
    if entry.tokens == "artifact" and prefix < 1:
        raise InvalidPlanError(
            f"the plan's {key} name artifact tokens, which are those that the class token looks at, but this model has no class "
            "token; name massive tokens instead"
        )
    place = (entry.tokens, first)
    if place not in finders:
        finder = finders[place] = _Finder(entry.tokens, prefix)
        block = blocks[first]
        if entry.tokens == "massive":
            _set(record, block.layer, _MASSIVE, finder)
            record.hooks.append(block.layer.register_forward_pre_hook(_find_massive, with_kwargs=True))
        else:
            _set(record, block.attention, _ARTIFACT, finder)
    return _Tokens(entry, finders[place])


def _find_massive(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of a range's first layer: find massive tokens in what enters it, the output of the block before."""
    finder: _Finder = getattr(layer, _MASSIVE)
    hidden = args[0] if args else kwargs["hidden_states"]
    finder.mask = torch.ops.fna.massive_tokens(hidden, finder.prefix_tokens)


def _set(record: _PatchRecord, module: nn.Module, name: str, value: Any) -> None:
    setattr(module, name, value)
    record.attributes.append((module, name))


def _undo(record: _PatchRecord) -> None:
    for hook in record.hooks:
        hook.remove()
    for module, name in record.attributes:
        delattr(module, name)
    for config, implementation in record.configs:
        config._attn_implementation = implementation


def _choose_landmarks(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of a layer: choose landmarks from the hidden states; what it needs is on the layer, so that copies work too."""
    state: _BlockState = getattr(layer, _CHOICE)
    hidden = args[0] if args else kwargs["hidden_states"]
    if _is_guided(state):  # by tokens that may only be found in the attention that follows
        state.hidden["input"] = hidden
    else:
        state.chosen[state.key] = (_select(state, hidden.shape[1], hidden), None)


def _is_guided(state: _BlockState) -> bool:
    return state.include is not None or state.exclude is not None


def _landmarks_for(state: _BlockState, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    entry, plan = state.entry, state.plan
    looks = find_sampler(entry.sampler).looks_at_features
    features = None
    if state.chooses and looks and entry.feature != "input":
        features = {"query": query, "key": key, "value": value}[entry.feature].mean(dim=1)
    if not _is_guided(state) and not looks:
        landmarks = _select(state, query.shape[2], None, query.device)
    else:
        if state.chooses and _is_guided(state):
            hidden = state.hidden.pop("input", None)
            state.chosen[state.key] = _guide(state, hidden if features is None else features, query)
        elif features is not None:
            state.chosen[state.key] = (_select(state, features.shape[1], features), None)
        landmarks, guided_bias = state.chosen[state.key]
        if guided_bias is not None:
            return landmarks, guided_bias
    if plan.method == "published":
        return landmarks, None
    bias = landmark_bias(
        query.shape[2], entry.landmarks, method=entry.sampler, prefix_tokens=state.prefix_tokens, device=query.device
    )
    return landmarks, bias


def _guide(state: _BlockState, features: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor | None]:
    include, exclude = (
        None if tokens is None else tokens.mask(query.shape[2], query.device)
        for tokens in (state.include, state.exclude)
    )
    landmarks, bias = guided_landmarks(
        features,
        state.entry.landmarks,
        method=state.entry.sampler,
        include=include,
        exclude=exclude,
        prefix_tokens=state.prefix_tokens,
        name=state.name,
    )
    return landmarks, None if state.plan.method == "published" else bias


def _select(
    state: _BlockState, num_tokens: int, features: Tensor | None, device: torch.device | None = None
) -> Tensor:  # [B or 1, S]
    entry, plan = state.entry, state.plan
    where = features.device if features is not None else device
    request = LandmarkRequest(num_tokens, entry.landmarks, state.prefix_tokens, plan.seed, plan.patches, where)
    return find_sampler(entry.sampler).select(request, features)


def _refuse_call(
    name: str, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    reason = None
    if mask is not None:
        reason = f"it was called with an attention mask of shape {list(mask.shape)}"
    elif kwargs.get("position_bias") is not None:
        reason = "it adds a position bias to the scores"
    elif kwargs.get("is_causal"):
        reason = "it is causal"
    elif key.shape != query.shape:
        reason = f"its queries {list(query.shape)} and keys {list(key.shape)} differ (cross-attention or grouped heads)"
    elif kwargs.get("softcap") is not None:
        reason = "it caps its scores"
    elif kwargs.get("sliding_window") is not None:
        reason = "it attends within a window"
    elif dropout:
        reason = f"it drops attention weights at random (p = {dropout}); call model.eval() first"
    if reason is not None:
        raise UnsupportedAttentionError(
            f"{name} cannot be FNA: {reason}; FNA approximates unmasked, full self-attention only. "
            "Leave the block out of the plan's layers"
        )


def _find_refusal(attention: nn.Module, layer: nn.Module, tower: nn.Module | None = None) -> str | None:
    names = {name.rsplit(".", 1)[-1] for name, _ in (*layer.named_modules(), *layer.named_parameters())}
    if getattr(attention, "is_causal", False):
        return "it is causal"
    if getattr(attention, "num_key_value_groups", 1) > 1:
        return "its key and value heads are grouped"
    if getattr(attention, "is_cross_attention", False) or any("cross" in part for part in _name_parts(attention)):
        return "it is cross-attention"
    for holder in (attention, layer):
        if getattr(holder, "window_size", 0) or getattr(holder, "sliding_window", 0):
            return "it attends within windows"
    if any("relative_position" in name or name.startswith("rel_pos") for name in names):
        return "it adds a relative position bias to the scores"
    if tower is not None and any("relative_position" in name for name, _ in tower.named_parameters()):
        return "its model adds a shared relative position bias to the scores"
    return None


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


def _enclosing_layer(model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Return the path of the module list that holds the block, and the block's layer in it."""
    layer = model.get_submodule(name)
    for path, parent in _parents(model, name):
        if isinstance(parent, nn.ModuleList):
            return path, layer
        layer = parent
    return name.rpartition(".")[0], model.get_submodule(name.rpartition(".")[0])


def _say_why_none(model: nn.Module) -> str:
    found = []
    for name, module in model.named_modules():
        if name and any(part in ("attention", "attn") for part in _name_parts(module)):
            reason = _find_refusal(module, _enclosing_layer(model, name)[1])
            found.append((name, reason or "it does not use transformers' attention interface on images"))
    if not found:
        seen = "it has no attention modules"
    else:
        name, reason = next((entry for entry in found if "interface" not in entry[1]), found[0])
        seen = f"the first, block 0 ({name}): {reason}; {len(found)} attention modules in all"
    return (
        f"{type(model).__name__} has no self-attention block that can be FNA ({seen}); "
        "choose a plain Vision Transformer, or export the model to ONNX and use fna graft"
    )


def _say_why_several(model: nn.Module, towers: dict[str, list[AttentionBlock]]) -> str:
    blocks = [block for tower in towers.values() for block in tower]
    if all(block.refusal for block in blocks):
        return (
            f"{type(model).__name__} has no self-attention block that can be FNA: block 0 ({blocks[0].name}): "
            f"{blocks[0].refusal}, and so for all {len(blocks)}; choose a plain Vision Transformer"
        )
    return (
        f"{type(model).__name__} has attention in {len(towers)} stacks ({', '.join(sorted(towers))}), but one is needed; "
        "patch the stack's own module if it is a vision model by itself"
    )


def is_patched(model: nn.Module) -> bool:
    """Return whether `patch` was applied to this module and not undone."""
    return hasattr(model, _PATCH)
