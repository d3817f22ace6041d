"""Setting a model up by a plan, and undoing it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fna.block_steps import BlockSteps, NamedTokens, steps_of
from fna.errors import InvalidPlanError, UnsupportedAttentionError
from fna.patching.attention import ATTENTION_NAME, EXACT, STATE, PlannedCall, register_with_transformers
from fna.patching.blocks import find_attention_blocks
from fna.patching.calls import CallHandler, intercept, release
from fna.patching.record import PATCH, AttentionBlock, Entering, entering_tokens
from fna.patching.state import BlockState, TokenFinder, TokenMask
from fna.patching.survey import Example
from fna.patching.towers import describe_towers, number_towers
from fna.plan import Plan
from fna.samplers.common.record import all_stand_alone

_CHOICE = "_fna_choice"
_MASSIVE = "_fna_massive"


@dataclass
class _PatchRecord:
    """What `unpatch` needs to undo a patch."""

    blocks: list[AttentionBlock]
    configs: list[tuple[Any, str | None]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str]] = field(default_factory=list)
    intercepted: list[nn.Module] = field(default_factory=list)


def patch(model: nn.Module, plan: Plan, example: Example = None) -> list[AttentionBlock]:
    """Make the blocks that `plan` lists compute Fast Nyström Attention, in place.

    Args:
        model: any module that contains a vision transformer, of the transformers library or one that calls
            `torch.nn.functional.scaled_dot_product_attention` or `nn.MultiheadAttention`; text towers and language models of
            transformers are left alone.
        plan: which blocks, how many landmarks, chosen how.
        example: what a model without transformers' attention interface is called with, as for `find_attention_blocks`; it is run
            on that once, to see its attention.

    Returns:
        All attention blocks of the model's vision tower, in order.

    Raises:
        ModelSourceError: if a model without the attention interface does not run on the example.
        InvalidPlanError: if the plan was made for another number of blocks, or the model is patched already.
        UnsupportedAttentionError: if the model has no block that could be FNA, or the plan lists one that cannot, by name.
    """
    if hasattr(model, PATCH):
        raise InvalidPlanError("the model is patched already; call fna.unpatch(model) before patching it anew")
    blocks = find_attention_blocks(model, example)
    if len(blocks) != plan.num_blocks:
        raise InvalidPlanError(
            f"the plan is for a model of {plan.num_blocks} attention blocks, but this one has {len(blocks)}; "
            "make a plan for this model"
        )
    towers = number_towers([block.tower_name for block in blocks])
    if towers != plan.towers:
        raise InvalidPlanError(
            f"the plan's towers are {describe_towers(plan.towers)}, but this model's are {describe_towers(towers)}; "
            "make a plan for this model"
        )
    for block in blocks:
        planned, masked = block.number in plan.replaced_blocks, plan.find_mask(block.number) is not None
        if block.refusal is not None and (planned or masked):
            raise UnsupportedAttentionError(
                f"block {block.number} ({block.name}) cannot be {'FNA' if planned else 'masked'}: {block.refusal}; "
                f"take it out of the plan's {'layers' if planned else 'masks'}"
            )
    record = _PatchRecord(blocks)
    try:
        _apply(blocks, plan, record)
    except BaseException:
        _undo(record)
        raise
    setattr(model, PATCH, record)
    return blocks


def unpatch(model: nn.Module) -> None:
    """Undo `patch`, so that the model computes exactly what it did before. Does nothing for a model that is not patched."""
    record = getattr(model, PATCH, None)
    if record is not None:
        _undo(record)
        delattr(model, PATCH)


def is_patched(model: nn.Module) -> bool:
    """Return whether `patch` was applied to this module and not undone."""
    return hasattr(model, PATCH)


def _apply(blocks: list[AttentionBlock], plan: Plan, record: _PatchRecord) -> None:
    states: dict[int, BlockState] = {}
    finders = _Finders(blocks, states, plan.prefix_tokens, record)
    # By tower and number of tokens: landmarks are shared among blocks that have the same tokens.
    shared: dict[Hashable, tuple[dict[Hashable, tuple[Tensor, Tensor | None]], set[Hashable]]] = {}
    for block in blocks:
        steps = _known_features(steps_of(plan, block.number), block)
        if steps.is_untouched:
            continue
        _check_frames(steps, block)
        prefix = block.prefix_tokens if plan.prefix_tokens is None else plan.prefix_tokens
        chosen, groups = shared.setdefault((block.tower_name, block.tokens), ({}, set()))
        state = BlockState(f"block {block.number} ({block.name})", steps, prefix, chosen, frames=block.frames)
        states[block.number] = state
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
            assert block.entering is not None
            state.entering = block.entering
            _set(record, block.layer, _CHOICE, state)
            record.hooks.append(block.layer.register_forward_pre_hook(_enter_block, with_kwargs=True))
    _switch(blocks, states, record)


def _switch(blocks: list[AttentionBlock], states: dict[int, BlockState], record: _PatchRecord) -> None:
    """Have the attention of each block computed by its state; blocks without one stay as they are."""
    handlers: dict[nn.Module, dict[int, CallHandler]] = {}
    for block in blocks:
        state = states.get(block.number)
        if block.call is not None:
            if state is not None:
                handlers.setdefault(block.attention, {})[block.call] = PlannedCall(state)
        elif state is None:
            _set(record, block.attention, EXACT, block.attention.config._attn_implementation or "sdpa")
        else:
            _set(record, block.attention, STATE, state)
    for module, answers in handlers.items():
        intercept(module, answers)
        record.intercepted.append(module)
    # All of them, exact blocks too: a traced model is then free of the masks of ones that transformers writes into it.
    interface = [block.attention for block in blocks if block.call is None]
    if interface:
        register_with_transformers()
    for config in {id(attention.config): attention.config for attention in interface}.values():
        record.configs.append((config, config._attn_implementation))
        config._attn_implementation = ATTENTION_NAME


def _check_frames(steps: BlockSteps, block: AttentionBlock) -> None:
    """Refuse what knows of one image only, in a block whose tokens are those of several."""
    if block.frames == 1:
        return
    named = [steps.key_masking.tokens] if steps.key_masking is not None else []
    reason = None
    if steps.focal is not None:
        reason = "focal attention knows the neighbours on one image only; make it FNA"
    if steps.nystrom is not None:
        choice = steps.nystrom.landmarks
        named += [tokens for tokens in (choice.include, choice.exclude) if tokens is not None]
        if steps.nystrom.correction is not None:
            reason = "a correction knows the neighbours on one image only; leave it out"
        elif choice.sampler.looks_at_features and choice.sampler.stand_alone is not all_stand_alone:
            reason = f"the {choice.sampler.name} sampler spreads landmarks over one image only; choose grid or lattice"
        elif choice.is_guided:
            reason = "landmarks are included or excluded on one image only; leave that out"
    if any(not isinstance(tokens.tokens, tuple) for tokens in named):
        reason = "artifact and massive tokens are found on one image only; name token indices"
    if reason is not None:
        raise InvalidPlanError(
            f"block {block.number} ({block.name}) attends over {block.frames} images at once: {reason}"
        )


def _known_features(steps: BlockSteps, block: AttentionBlock) -> BlockSteps:
    """Choose landmarks from the queries where the hidden states that enter a block cannot be had."""
    if steps.nystrom is None or block.entering is not None or steps.nystrom.landmarks.feature != "input":
        return steps
    landmarks = replace(steps.nystrom.landmarks, feature="query")
    return replace(steps, nystrom=replace(steps.nystrom, landmarks=landmarks))


@dataclass
class _Finders:
    """Has the tokens that a plan names found once, for all blocks that name them."""

    blocks: list[AttentionBlock]
    states: dict[int, BlockState]
    prefix_tokens: int | None
    record: _PatchRecord
    known: dict[NamedTokens, TokenFinder] = field(default_factory=dict)

    def mask(self, key: str, named: NamedTokens | None) -> TokenMask | None:
        """Return the mask of tokens that the plan's field `key` names; None for none."""
        if named is None:
            return None
        if isinstance(named.tokens, tuple):
            return TokenMask(named, None)
        block = self.blocks[named.found_at]
        prefix = block.prefix_tokens if self.prefix_tokens is None else self.prefix_tokens
        if named.tokens == "artifact" and prefix < 1:
            raise InvalidPlanError(
                f"the plan's {key} name artifact tokens, which are those that the class token looks at, but this model has no "
                "class token; name massive tokens instead"
            )
        if named not in self.known:
            finder = self.known[named] = TokenFinder(named.tokens, prefix)
            if named.tokens == "massive":
                finder.entering = _need_entering(block, key)
                _set(self.record, block.layer, _MASSIVE, finder)
                self.record.hooks.append(block.layer.register_forward_pre_hook(_find_massive, with_kwargs=True))
            else:
                self.states[block.number].artifact_finder = finder
        return TokenMask(named, self.known[named])


def _need_entering(block: AttentionBlock, key: str) -> Entering:
    if block.entering is None:
        raise InvalidPlanError(
            f"the plan's {key} name massive tokens, but the hidden states that enter block {block.number} ({block.name}) cannot be "
            "seen; name artifact tokens or token indices"
        )
    return block.entering


def _find_massive(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of a range's first layer: find massive tokens in what enters it, the output of the block before."""
    finder: TokenFinder = getattr(layer, _MASSIVE)
    finder.find(entering_tokens(finder.entering, args, kwargs))


def _enter_block(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of a layer that chooses landmarks; what it needs is on the layer, so that copies of a model work too."""
    state: BlockState = getattr(layer, _CHOICE)
    state.enter(entering_tokens(state.entering, args, kwargs))


def _set(record: _PatchRecord, module: nn.Module, name: str, value: Any) -> None:
    setattr(module, name, value)
    record.attributes.append((module, name))


def _undo(record: _PatchRecord) -> None:
    for hook in record.hooks:
        hook.remove()
    for module, name in record.attributes:
        delattr(module, name)
    for module in record.intercepted:
        release(module)
    for config, implementation in record.configs:
        config._attn_implementation = implementation
