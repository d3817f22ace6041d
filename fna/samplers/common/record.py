"""What a sampler is: how it selects in PyTorch and in ONNX, what its landmarks weigh, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ONNX_DOMAIN = "fna"
"""Domain of this project's ONNX operators: `op.FarthestPointSampling(features, domain=ONNX_DOMAIN, num_landmarks=64)`."""

Expressions = Any
"""A builder of ONNX nodes, on which each operator is a method that takes and returns values: `op.TopK(x, [8], axis=1, outputs=2)`.
Numbers, lists and arrays are constants; see `fna.export.operators.builder`."""


@dataclass(frozen=True)
class LandmarkRequest:
    """What is asked of a sampler.

    Attributes:
        num_tokens: N; symbolic while a model of open size is traced.
        num_landmarks: S, from 1 to N.
        prefix_tokens: class and register tokens at the front.
        seed: for samplers that draw.
        patches: rows and columns of the patch tokens; None takes them for a square.
        device: where the result is made; None is the CPU.
    """

    num_tokens: int
    num_landmarks: int
    prefix_tokens: int = 1
    seed: int = 0
    patches: tuple[int, int] | None = None
    device: torch.device | str | None = None

    @property
    def prefix(self) -> int:
        """How many landmarks are prefix tokens."""
        return min(self.prefix_tokens, self.num_landmarks)


@dataclass(frozen=True)
class GuidedSelection:
    """How a sampler chooses when tokens are included and excluded; see `fna.samplers.common.roles`.

    Attributes:
        select: from the request, the features `[B, N, C]` (None for samplers that do not look at them) and roles `[B or 1, N]`,
            the landmarks, int32, and their bias, fp32, both `[B or 1, S]`.
        nodes: the same in ONNX: from a builder, the request, the features' value and the roles' value; the bias is None where
            every weight is 1.
        guarantees_prefix: prefix tokens are guaranteed unless excluded.
    """

    select: Callable[[LandmarkRequest, Tensor | None, Tensor], tuple[Tensor, Tensor]]
    nodes: Callable[[Expressions, LandmarkRequest, str | None, str], tuple[str, str | None]]
    guarantees_prefix: bool = True


def prefix_stands_alone(num_landmarks: int, prefix_tokens: int) -> int:
    """Prefix tokens stand for themselves; the other landmarks share the other tokens."""
    return min(prefix_tokens, num_landmarks)


def all_stand_alone(num_landmarks: int, prefix_tokens: int) -> int:
    """Every landmark stands for itself: all weights are 1."""
    return num_landmarks


def nothing(num_landmarks: int) -> int:
    """The cost of a sampler that does not look at the image."""
    return 0


@dataclass(frozen=True)
class Sampler:
    """One way to choose landmarks.

    Attributes:
        name: as plans and the command line have it; that of the file, with `-` for `_`.
        summary: what it does, for people.
        select: from a request and the features `[B, N, C]`, the landmarks, int32 `[B, S]`. A sampler that does not look at
            features gets None and returns `[1, S]`, the same for every image, which becomes a constant in the file.
        looks_at_features: it chooses anew for every image.
        nodes: for one that looks at features, `select` in ONNX: from a builder, the features' value and the request (whose number
            of tokens may be None: open), the landmarks' value.
        open_size_nodes: for one that does not, the landmarks in ONNX where the number of tokens is only known at run time: from a
            builder, that number's value (int64, `[1]`) and the request. None: such files are refused.
        needs_positions: where on the image a token is matters to it.
        stand_alone: how many of S landmarks, given the prefix tokens, stand for themselves alone (weight 1); they come first.
            The others share the other tokens equally.
        select_masked: as `select`, with boolean masks `[B, N]` of guaranteed and of excluded tokens, features always given.
            None: masks are refused.
        guided: for plans that include or exclude tokens; None: such plans are refused.
        nested: its first landmarks are those that it chooses when asked for fewer.
        compared: `fna plan --compare` runs it in all blocks alike.
        planned: `fna plan` tries it where no samplers are named.
        passes: how often S landmarks take reading all features, with one product for each number read.
        launches: kernels that S landmarks take on a GPU.
    """

    name: str
    summary: str
    select: Callable[[LandmarkRequest, Tensor | None], Tensor]
    looks_at_features: bool = False
    nodes: Callable[[Expressions, str, LandmarkRequest], str] | None = None
    open_size_nodes: Callable[[Expressions, str, LandmarkRequest], str] | None = None
    needs_positions: bool = False
    stand_alone: Callable[[int, int], int] = prefix_stands_alone
    select_masked: Callable[[LandmarkRequest, Tensor, Tensor, Tensor], Tensor] | None = None
    guided: GuidedSelection | None = None
    nested: bool = False
    planned: bool = True
    compared: bool = False
    passes: Callable[[int], int] = nothing
    launches: Callable[[int], int] = nothing

    @property
    def takes_open_size(self) -> bool:
        """Whether it can be written for a number of tokens that is only known at run time."""
        return self.looks_at_features or self.open_size_nodes is not None
