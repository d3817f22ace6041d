"""What a focal node of a graph reads besides query, key and value: the lists of keys, as constants."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from fna.block_steps import FocalStep
from fna.errors import InvalidArgumentError, InvalidPlanError
from fna.export.surgery.recognise.rows import Attention
from fna.focal import check_hot
from fna.focal_keys import focal_keys
from fna.samplers.common.spacing import patch_grid


class Constants(Protocol):
    """What makes an initializer of an array and returns its name."""

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initializer; equal ones are shared."""


def focal_lists(
    constants: Constants, attention: Attention, step: FocalStep, prefix_tokens: int, block: int
) -> list[str]:
    """Names of the queries, keys, biases and places of one block's tiles.

    Raises:
        InvalidPlanError: if the file leaves the number of tokens open, or its patches are no grid that the step fits.
    """
    if len(set(attention.tokens)) != 1:
        raise InvalidPlanError(
            f"focal attention of block {block} needs a fixed number of tokens, but this file leaves its input size open; "
            "set it by --resolution"
        )
    tokens = attention.tokens[0]
    try:
        patches = patch_grid(tokens, prefix_tokens, step.patches)
        check_hot(step.hot, tokens - prefix_tokens)
        lists = focal_keys(patches, prefix_tokens, step.tile, step.levels, step.seed)
    except InvalidArgumentError as error:
        raise InvalidPlanError(f"block {block} cannot be focal attention: {error}") from None
    arrays = {"queries": lists.queries, "keys": lists.keys, "bias": lists.bias, "places": lists.places}
    return [constants.constant(f"fna/focal_{name}_{block}", array) for name, array in arrays.items()]
