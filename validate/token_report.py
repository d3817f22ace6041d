"""What a survey of massive and artifact tokens found on photographs: as numbers, as a table, and drawn on the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from pydantic import BaseModel, ConfigDict

from fna.block_numbers import format_layers
from fna.export.sources.loading import LoadedModel, check_resolution
from fna.files import written_whole
from fna.patching import find_attention_blocks
from fna.plan import TokenRange
from fna.special_tokens import MINIMAL_GAP
from fna.token_survey import BlockTokens, survey_tokens

_SIDE = 256
"""Pixels along a panel's side."""

_MASSIVE_COLOUR, _ARTIFACT_COLOUR = "red", "deepskyblue"


class FoundToken(BaseModel):
    """One massive or artifact token.

    Attributes:
        token: its index.
        row: of its patch, from the top; None for prefix tokens.
        column: of its patch, from the left; None likewise.
        value: its norm in the block's output, or for artifacts the class token's attention to it.
    """

    model_config = ConfigDict(frozen=True)

    token: int
    row: int | None
    column: int | None
    value: float


class BlockReport(BaseModel):
    """One block on one photograph.

    Attributes:
        block: its number.
        name: the attention module's path.
        median_norm: of the block's output over all tokens.
        largest_norm: likewise.
        gap: the largest ratio between neighbours in the sorted norms, among the largest eighth.
        massive: tokens above that gap, where it is large enough.
        class_attention_to_itself: mean over heads; None without a class token.
        artifacts: patch tokens that draw more of it; None without a class token.
    """

    model_config = ConfigDict(frozen=True)

    block: int
    name: str
    median_norm: float
    largest_norm: float
    gap: float
    massive: tuple[FoundToken, ...]
    class_attention_to_itself: float | None
    artifacts: tuple[FoundToken, ...] | None


class ImageReport(BaseModel):
    """All blocks on one photograph."""

    model_config = ConfigDict(frozen=True)

    image: str
    blocks: tuple[BlockReport, ...]


class Proposal(BaseModel):
    """Lines for a plan that fit what was found.

    Attributes:
        plan: fields of `fna.plan.Plan`.
        why: what they do.
    """

    model_config = ConfigDict(frozen=True)

    plan: dict[str, tuple[TokenRange, ...]]
    why: str


class TokenReport(BaseModel):
    """A survey of a model.

    Attributes:
        model: its name.
        height: of the images, in pixels.
        width: likewise.
        prefix_tokens: class and register tokens at the front.
        minimal_ratio: the smallest gap that separates massive tokens, as a ratio of norms.
        images: one entry per photograph.
        skipped: image files that could not be read.
        proposals: lines for a plan, see `propose`; none where a plan could do nothing about these tokens.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    height: int
    width: int
    prefix_tokens: int
    minimal_ratio: float
    images: tuple[ImageReport, ...]
    skipped: tuple[str, ...] = ()
    proposals: tuple[Proposal, ...] = ()


def survey_photographs(
    model: LoadedModel,
    images: Sequence[tuple[str, Image.Image]],
    size: tuple[int, int],
    *,
    skipped: Sequence[str] = (),
    picture_folder: Path | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> TokenReport:
    """Find massive and artifact tokens in every block on every photograph.

    Args:
        model: from `fna.export.sources.loading.load_model`.
        images: photographs, by name.
        size: height and width in pixels.
        skipped: image files that could not be read, for the record.
        picture_folder: where a PNG for each photograph is written; None writes none.
        say: called with what is being done.

    Raises:
        ModelSourceError: for an image size that the model does not take.
        InputFileError: if a picture cannot be written.
    """
    height, width = size
    check_resolution(model, height, width)
    prefix = find_attention_blocks(model.module)[0].prefix_tokens
    grid = (height // model.patch_size, width // model.patch_size)
    reports = []
    for name, image in images:
        say(f"surveying {name}")
        pixels = torch.from_numpy(model.preprocessing.apply(image, height, width))[None]
        blocks = survey_tokens(model.module, lambda pixels=pixels: model.module(pixels), prefix_tokens=prefix)  # type: ignore[misc]
        reports.append(ImageReport(image=name, blocks=tuple(_report(block, prefix, grid) for block in blocks)))
        if picture_folder is not None:
            draw_tokens(image, blocks, prefix, grid, picture_folder / f"tokens-{Path(name).stem}.png", name)
    return TokenReport(
        model=model.name,
        height=height,
        width=width,
        prefix_tokens=prefix,
        minimal_ratio=float(np.exp(MINIMAL_GAP)),
        images=tuple(reports),
        skipped=tuple(skipped),
        proposals=propose(reports),
    )


def propose(images: Sequence[ImageReport]) -> tuple[Proposal, ...]:
    """Say what a plan could do about the tokens that were found on at least half of the photographs.

    Massive patch tokens matter to the blocks that they enter, those after the block whose output they are in; artifact tokens to
    the block that finds them. Whether a proposal helps is measured by nobody but `fna validate` (docs/tokens.md has examples).
    """
    massive: Counter[int] = Counter()
    artifacts: Counter[int] = Counter()
    for image in images:
        numbers = [block.block for block in image.blocks]
        for block, following in zip(image.blocks, numbers[1:], strict=False):
            massive[following] += any(token.row is not None for token in block.massive)
        for block in image.blocks:
            artifacts[block.block] += bool(block.artifacts)

    def often(counts: Counter[int]) -> set[int]:
        return {block for block, count in counts.items() if count and 2 * count >= len(images)}

    entered = often(massive)
    masked = [TokenRange(blocks=format_layers(entered), tokens="massive")] if entered else []
    others = often(artifacts) - entered  # a block has one mask
    masked += [TokenRange(blocks=format_layers(others), tokens="artifact")] if others else []
    proposals = []
    if masked:
        proposals.append(
            Proposal(
                plan={"masks": tuple(masked), "landmarks_exclude": tuple(masked)},
                why="changes the model: no other token attends to these, and no landmark is spent on them",
            )
        )
    if entered:
        proposals.append(
            Proposal(
                plan={"landmarks_include": (masked[0],)},
                why="keeps to the model: massive tokens become landmarks that stand for themselves; better or worse, by size",
            )
        )
    return tuple(proposals)


def draw_tokens(
    image: Image.Image,
    blocks: Sequence[BlockTokens],
    prefix_tokens: int,
    grid: tuple[int, int],
    path: Path,
    title: str,
) -> None:
    """Write a PNG with a panel for each block: log norms over the photograph, massive tokens in red, artifacts in blue."""
    rows, columns = grid
    height, width = _SIDE, max(1, round(_SIDE * columns / rows))
    photograph = np.asarray(image.convert("RGB").resize((width, height)).convert("L"))
    across = min(4, len(blocks))
    down = -(-len(blocks) // across)
    figure = Figure(figsize=(3 * across, 3.2 * down))
    axes = figure.subplots(down, across, squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.24 / down, wspace=0.03, hspace=0.12)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, block in zip(axes.flat, blocks, strict=False):
        axis.imshow(photograph, cmap="gray", extent=(0, columns, rows, 0))
        _draw_block(axis, block, prefix_tokens, grid)
    figure.suptitle(f"{title}: log norms, massive tokens (red), artifact tokens (blue)", fontsize=11)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=80, format="png")


def _draw_block(axis: Axes, block: BlockTokens, prefix_tokens: int, grid: tuple[int, int]) -> None:
    rows, columns = grid
    norms = block.norms[0, prefix_tokens:].clamp(min=1e-12).log().reshape(rows, columns).numpy()
    axis.imshow(norms, cmap="viridis", alpha=0.5, extent=(0, columns, rows, 0))
    counts = []
    for kind, tokens, colour, inset in (
        ("massive", block.massive, _MASSIVE_COLOUR, 0.0),
        ("artifact", block.artifacts, _ARTIFACT_COLOUR, 0.15),
    ):
        if tokens is None:
            continue
        counts.append(f"{int(tokens[0].sum())} {kind}")
        side = 1 - 2 * inset
        for patch in tokens[0, prefix_tokens:].nonzero().flatten().tolist():
            corner = (patch % columns + inset, patch // columns + inset)
            axis.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=1.5))
    axis.set_title(f"block {block.block}: {', '.join(counts)}", fontsize=9)


def _report(block: BlockTokens, prefix: int, grid: tuple[int, int]) -> BlockReport:
    attention = block.class_attention
    return BlockReport(
        block=block.block,
        name=block.name,
        median_norm=float(block.norms[0].median()),
        largest_norm=float(block.norms[0].max()),
        gap=float(block.gap[0].exp()),
        massive=_tokens(block.massive[0], block.norms[0], prefix, grid),
        class_attention_to_itself=None if attention is None else float(attention[0, 0]),
        artifacts=(
            None
            if attention is None or block.artifacts is None
            else _tokens(block.artifacts[0], attention[0], prefix, grid)
        ),
    )


def _tokens(chosen: torch.Tensor, values: torch.Tensor, prefix: int, grid: tuple[int, int]) -> tuple[FoundToken, ...]:
    def describe(token: int) -> FoundToken:
        patch = token - prefix
        row, column = (None, None) if patch < 0 else (patch // grid[1], patch % grid[1])
        return FoundToken(token=token, row=row, column=column, value=float(values[token]))

    return tuple(describe(token) for token in chosen.nonzero().flatten().tolist())
