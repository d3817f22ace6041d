"""What is known of one attention block of a model, however it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

PATCH = "_fna_patch"
"""On a patched model: what `unpatch` needs, its blocks among it."""

BLOCKS = "_fna_blocks"
"""On a model of ours that does not change: its blocks, so that it is not run anew for each question about them."""

Entering = Literal["tokens", "tokens first", "map"]
"""How a layer is given its tokens: `[B, N, C]`, `[N, B, C]`, or the rows and columns of a map `[B, h, w, C]`."""


@dataclass(frozen=True)
class AttentionBlock:
    """One attention block of a vision model, as found by `find_attention_blocks`.

    Attributes:
        number: its place among the blocks, from 0.
        name: the attention module's path in the model, and the place of the call behind `#` where it is not the module's first.
        attention: the attention module.
        layer: the transformer layer that holds it; the hidden states that enter it are the residual stream.
        tower: the vision model that it belongs to.
        refusal: why it cannot be FNA, or None.
        prefix_tokens: class and register tokens before each sequence's patches.
        heads: H; 0 where it is not known, of a block that is refused.
        head_size: D, likewise.
        tokens: N, in the run that showed the block; 0 where it was not shown by one.
        entering: how the layer is given its tokens; None where it is not given all of them.
        patches: rows and columns of its patches, in the run that showed the block; None where they are not known.
        tower_name: of the stack of blocks that it belongs to; see `fna.patching.towers`.
        frames: how many sequences, each with its own prefix tokens, follow one another in its tokens: images of a scene, windows.
        call: which of the calls of `scaled_dot_product_attention` in a forward of the module it is; None for a module that uses
            transformers' attention interface.
        runs: how often it runs in one forward of the model.
    """

    number: int
    name: str
    attention: nn.Module
    layer: nn.Module
    tower: nn.Module
    refusal: str | None
    prefix_tokens: int
    heads: int
    head_size: int
    tokens: int = 0
    entering: Entering | None = "tokens"
    patches: tuple[int, int] | None = None
    tower_name: str = ""
    frames: int = 1
    call: int | None = None
    runs: int = 1


def entering_tokens(
    entering: Entering,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:  # [B, N, C]
    """Return the tokens among the arguments of a layer."""
    given = kwargs["hidden_states"] if not args and "hidden_states" in kwargs else None
    if given is None:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return as_tokens(given, entering)


def as_tokens(hidden: Tensor, entering: Entering) -> Tensor:  # [B, N, C]
    """Return hidden states in the order `[B, N, C]`."""
    if entering == "tokens first":
        return hidden.transpose(0, 1)
    return hidden.flatten(1, 2) if hidden.dim() == 4 else hidden  # a map, as SAM 3's layers of transformers have it too
