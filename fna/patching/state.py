"""What a patched block keeps: its steps, its landmarks while a model runs, and the tokens that its plan names."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fna.block_steps import BlockSteps, LandmarkChoice, NamedTokens
from fna.patching.record import Entering
from fna.samplers import landmark_bias
from fna.samplers.common.frames import landmarks_over_frames
from fna.samplers.common.roles import guided_landmarks
from fna.special_tokens import listed_tokens_mask


@dataclass
class TokenFinder:
    """Finds massive or artifact tokens at one layer or attention module; all that ask for them share it."""

    kind: Literal["artifact", "massive"]
    prefix_tokens: int
    entering: Entering = "tokens"
    mask: Tensor | None = None  # [B, N], of the run that is under way

    def find(self, *tensors: Tensor | float) -> None:
        """Find them: massive tokens in hidden states `[B, N, C]`; artifacts by query and key `[B, H, N, D]` and the scale."""
        operators = {"massive": torch.ops.fna.massive_tokens, "artifact": torch.ops.fna.artifact_tokens}
        self.mask = operators[self.kind](*tensors, self.prefix_tokens)


@dataclass
class TokenMask:
    """Tokens that a plan names: listed, or found by a finder."""

    named: NamedTokens
    finder: TokenFinder | None

    def mask(self, num_tokens: int, device: torch.device) -> Tensor:  # [B, N] or [1, N], int32
        """Which tokens these are, once the block that finds them was entered."""
        if isinstance(self.named.tokens, tuple):
            return listed_tokens_mask(self.named.tokens, num_tokens, device)
        assert self.finder is not None
        assert self.finder.mask is not None
        return self.finder.mask


@dataclass
class BlockState:
    """What an attention module needs to know to run by a plan.

    Attributes:
        name: for errors.
        steps: what it computes.
        prefix_tokens: class and register tokens.
        chosen: landmarks, and their bias where tokens are included or excluded, by group; all blocks of a model share it.
        chooses: whether it is the first block of its group.
        masked: tokens masked as keys.
        include: tokens that are landmarks.
        exclude: tokens that are not.
        artifact_finder: of artifact tokens that are to be found at this block.
        entering: how the block's layer is given its tokens.
        frames: sequences that follow one another in its tokens, each with its own prefix tokens.
        hidden: what entered the block's layer, kept until its attention runs.
    """

    name: str
    steps: BlockSteps
    prefix_tokens: int
    chosen: dict[Hashable, tuple[Tensor, Tensor | None]]
    chooses: bool = False
    masked: TokenMask | None = None
    include: TokenMask | None = None
    exclude: TokenMask | None = None
    artifact_finder: TokenFinder | None = None
    entering: Entering = "tokens"
    frames: int = 1
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def choice(self) -> LandmarkChoice:
        """How an FNA block gets its landmarks."""
        assert self.steps.nystrom is not None
        return self.steps.nystrom.landmarks

    def enter(self, hidden: Tensor) -> None:
        """Choose landmarks from the hidden states `[B, N, C]`, or keep them for a choice by tokens that attention finds."""
        if self.choice.is_guided:
            self.hidden[:] = [hidden]
        else:
            self.chosen[self.choice.group] = (self._select(hidden), None)

    def landmarks_for(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return landmarks `[B or 1, S]` and their bias, None where all weights are 1 by the plan's method."""
        choice, num_tokens = self.choice, query.shape[2]
        looks = choice.sampler.looks_at_features
        features = None
        if self.chooses and looks and choice.feature != "input":
            features = {"query": query, "key": key, "value": value}[choice.feature].mean(dim=1)
        bias = None
        if choice.is_guided:
            if self.chooses:
                self.chosen[choice.group] = self._guide(features, query)
            landmarks, bias = self.chosen[choice.group]
        elif looks:
            if features is not None:
                self.chosen[choice.group] = (self._select(features), None)
            landmarks, _ = self.chosen[choice.group]
        elif self.frames > 1:
            request = choice.request(num_tokens, self.prefix_tokens, query.device)
            landmarks, weights = landmarks_over_frames(choice.sampler, request, self.frames)
            return landmarks, weights if choice.weighted else None
        else:
            landmarks = choice.sampler.select(choice.request(num_tokens, self.prefix_tokens, query.device), None)
        if bias is not None or not choice.weighted:
            return landmarks, bias
        bias = landmark_bias(
            num_tokens,
            choice.num_landmarks,
            method=choice.sampler.name,
            prefix_tokens=self.prefix_tokens,
            device=query.device,
        )
        return landmarks, bias

    def _select(self, features: Tensor) -> Tensor:
        request = self.choice.request(features.shape[1], self.prefix_tokens, features.device)
        return self.choice.sampler.select(request, features)

    def _guide(self, features: Tensor | None, query: Tensor) -> tuple[Tensor, Tensor | None]:
        if features is None and self.hidden:
            features = self.hidden.pop()
        include, exclude = (
            None if tokens is None else tokens.mask(query.shape[2], query.device)
            for tokens in (self.include, self.exclude)
        )
        landmarks, bias = guided_landmarks(
            features,
            self.choice.num_landmarks,
            method=self.choice.sampler.name,
            include=include,
            exclude=exclude,
            prefix_tokens=self.prefix_tokens,
            name=self.name,
        )
        return landmarks, bias if self.choice.weighted else None
