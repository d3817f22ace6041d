"""Setting a model up by a plan, and undoing it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fna.block_steps import NamedTokens, steps_of
from fna.errors import InvalidPlanError, UnsupportedAttentionError
from fna.patching.attention import ATTENTION_NAME, EXACT, STATE, register_with_transformers
from fna.patching.blocks import AttentionBlock, find_attention_blocks
from fna.patching.state import BlockState, TokenFinder, TokenMask
from fna.plan import Plan
from fna.special_tokens import detect_prefix_tokens

_PATCH = "_fna_patch"
_CHOICE = "_fna_choice"
_MASSIVE = "_fna_massive"


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
        planned, masked = block.number in plan.replaced_blocks, plan.find_mask(block.number) is not None
        if block.refusal is not None and (planned or masked):
            raise UnsupportedAttentionError(
                f"block {block.number} ({block.name}) cannot be {'FNA' if planned else 'masked'}: {block.refusal}; "
                f"take it out of the plan's {'layers' if planned else 'masks'}"
            )
    register_with_transformers()
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


def is_patched(model: nn.Module) -> bool:
    """Return whether `patch` was applied to this module and not undone."""
    return hasattr(model, _PATCH)


def _apply(blocks: list[AttentionBlock], plan: Plan, record: _PatchRecord) -> None:
    prefix = plan.prefix_tokens if plan.prefix_tokens is not None else detect_prefix_tokens(blocks[0].tower)
    finders = _Finders(blocks, prefix, record)
    chosen: dict[Hashable, tuple[Tensor, Tensor | None]] = {}
    groups: set[Hashable] = set()
    for block in blocks:
        steps = steps_of(plan, block.number)
        if steps.is_untouched:
            _set(record, block.attention, EXACT, block.attention.config._attn_implementation or "sdpa")
            continue
        state = BlockState(f"block {block.number} ({block.name})", steps, prefix, chosen)
        _set(record, block.attention, STATE, state)
        if steps.key_masking is not None:
            state.masked = finders.mask("masks", steps.key_masking.tokens)
        if steps.nystrom is None:
            continue
        choice = steps.nystrom.landmarks
        state.include = finders.mask("landmarks_include", choice.include)
        state.exclude = finders.mask("landmarks_exclude", choice.exclude)
        state.chooses = choice.group not in groups
        groups.add(choice.group)
        if state.chooses and choice.feature == "input" and choice.sampler.looks_at_features:
            _set(record, block.layer, _CHOICE, state)
            record.hooks.append(block.layer.register_forward_pre_hook(_enter_block, with_kwargs=True))
    # All of them, exact blocks too: a traced model is then free of the masks of ones that transformers writes into it.
    for config in {id(block.attention.config): block.attention.config for block in blocks}.values():
        record.configs.append((config, config._attn_implementation))
        config._attn_implementation = ATTENTION_NAME


@dataclass
class _Finders:
    """Has the tokens that a plan names found once, for all blocks that name them."""

    blocks: list[AttentionBlock]
    prefix_tokens: int
    record: _PatchRecord
    known: dict[NamedTokens, TokenFinder] = field(default_factory=dict)

    def mask(self, key: str, named: NamedTokens | None) -> TokenMask | None:
        """Return the mask of tokens that the plan's field `key` names; None for none."""
        if named is None:
            return None
        if isinstance(named.tokens, tuple):
            return TokenMask(named, None)
        if named.tokens == "artifact" and self.prefix_tokens < 1:
            raise InvalidPlanError(
                f"the plan's {key} name artifact tokens, which are those that the class token looks at, but this model has no "
                "class token; name massive tokens instead"
            )
        if named not in self.known:
            finder = self.known[named] = TokenFinder(named.tokens, self.prefix_tokens)
            block = self.blocks[named.found_at]
            if named.tokens == "massive":
                _set(self.record, block.layer, _MASSIVE, finder)
                self.record.hooks.append(block.layer.register_forward_pre_hook(_find_massive, with_kwargs=True))
            else:
                getattr(block.attention, STATE).artifact_finder = finder
        return TokenMask(named, self.known[named])


def _find_massive(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of a range's first layer: find massive tokens in what enters it, the output of the block before."""
    finder: TokenFinder = getattr(layer, _MASSIVE)
    finder.find(_hidden_states(args, kwargs))


def _enter_block(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of a layer that chooses landmarks; what it needs is on the layer, so that copies of a model work too."""
    state: BlockState = getattr(layer, _CHOICE)
    state.enter(_hidden_states(args, kwargs))


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


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
