"""What is planned for: a model whose attention can be looked into, and run by a plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fna.block_numbers import parse_layers
from fna.errors import InvalidArgumentError
from fna.export.preprocessing import Preprocessing
from fna.export.sources.loading import LoadedModel, check_resolution
from fna.export.sources.running import patched, run_torch
from fna.observing import AttentionCall, observed
from fna.patching import AttentionBlock, find_attention_blocks
from fna.plan import Plan
from fna.runtime import Arrays
from fna.validate.task.inputs import OutputKinds

PROBES = 2
"""Random directions of the output whose gradients say how much an error in a block matters; each token adds to the average."""


@dataclass(frozen=True)
class Layout:
    """The sizes that planning needs.

    Attributes:
        model: name for the plan.
        num_blocks: attention blocks, those included that cannot be FNA.
        refused: of those, the ones that cannot, with the reason.
        tokens: N.
        heads: H.
        head_size: D.
        channels: C of the hidden states.
        prefix_tokens: class and register tokens.
        patches: rows and columns of patches, or None where they are not on a grid that is known.
        resolution: height and width in pixels.
        frames: images at once, whose tokens follow one another; each has its own prefix tokens.
        towers: of the model, as in a plan; blocks of other towers than the one planned for are among those refused.
        tower: the one planned for; None in a model of one.
    """

    model: str
    num_blocks: int
    refused: dict[int, str]
    tokens: int
    heads: int
    head_size: int
    channels: int
    prefix_tokens: int
    patches: tuple[int, int] | None
    resolution: tuple[int, int]
    frames: int = 1
    towers: dict[str, str] = field(default_factory=dict)
    tower: str | None = None

    @property
    def own_blocks(self) -> list[int]:
        """Blocks of the tower planned for, those included that cannot be FNA; all blocks of a model of one tower."""
        text = "all" if self.tower is None else f"{self.tower}:all"
        return parse_layers(text, self.num_blocks, self.towers if self.tower is not None else None)

    def prefix_among(self, count: int) -> int:
        """How many of so many tokens of an output precede the patches: none where the model hands out patches alone."""
        return 0 if count <= self.prefix_tokens or count == self.tokens - self.prefix_tokens else self.prefix_tokens


@dataclass(frozen=True)
class BlockView:
    """One block's attention on one image, and how much an error in it matters.

    Attributes:
        number: the block's.
        query: `[1, H, N, D]`.
        key: `[1, H, N, D]`.
        value: `[1, H, N, D]`.
        exact: exact attention, `[1, H, N, D]`.
        scale: factor on the scores.
        hidden: what enters the block, `[1, N, C]`; None where it is not known.
        root: `[H, D, D]`, such that the sum of squares of `e @ root` is the loss `1 - cosine` of the final tokens that an error `e`
            `[H, N, D]` of this block causes, to first order and as if the errors of tokens were independent.
        coherence: `[H]`, by how much more an error that all tokens share weighs than one that differs from token to token.
        gradients: `[K, H, N, D]`, such that the mean over K of `(gradient . e)^2` is that loss to first order, dependent or not,
            in expectation; None where gradients cannot be had.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    exact: Tensor
    scale: float
    hidden: Tensor | None
    root: Tensor
    coherence: Tensor
    gradients: Tensor | None = None


class Subject(Protocol):
    """A model at one resolution, for `fna.validate.planning.planner`."""

    layout: Layout
    preprocessing: Preprocessing

    def look(self, pixels: NDArray[np.float32], visit: Callable[[BlockView], None]) -> None:
        """Run one image `[3, H, W]` exactly and show every block that can be FNA, in order."""

    def run(self, pixels: NDArray[np.float32], plan: Plan | None) -> Arrays:
        """Run one image `[3, H, W]` by a plan, None is exact; returns the outputs by name, batch of one."""

    def tokens(self, outputs: Arrays) -> NDArray[np.float32]:
        """The tokens `[T, C]` that fidelity is measured on, of the outputs of one image."""

    def kinds(self, outputs: Arrays) -> OutputKinds:
        """What the outputs are, for tasks."""

    def fingerprint(self) -> str:
        """Tell weights apart that go by one name: what is cached of a model is not that of the same model trained further."""


def _check_tower(model: LoadedModel, tower: str | None) -> None:
    if tower in model.towers or (tower is None and not model.towers):
        return
    names = ", ".join(model.towers)
    has = f"has the towers {names}; choose one with fna plan --tower" if names else "has one tower; leave --tower out"
    what = "all towers at once" if tower is None else f"tower {tower!r}"
    raise InvalidArgumentError(f"{what} cannot be planned for: {model.name} {has}")


class TorchSubject:
    """A PyTorch model: sensitivities are gradients."""

    def __init__(self, model: LoadedModel, height: int, width: int, tower: str | None = None) -> None:
        """Read the sizes off one run of a blank image.

        Args:
            model: the model.
            height: of the images, in pixels.
            width: of the images, in pixels.
            tower: the one that is planned for, in a model of several; the others stay exact.

        Raises:
            InvalidArgumentError: for a tower that the model does not have, or none where it has several.
            ModelSourceError: if the model does not take images of that size.
        """
        check_resolution(model, height, width)
        self.model, self.preprocessing = model, model.preprocessing
        blocks = find_attention_blocks(model.module)
        _check_tower(model, tower)
        refused = {
            block.number: block.refusal or f"it is of the tower {block.tower_name}"
            for block in blocks
            if block.refusal is not None or (model.towers and block.tower_name != tower)
        }
        shapes: dict[int, torch.Size] = {}
        with torch.inference_mode(), observed(model.module, lambda call: shapes.update({call.block: call.query.shape})):
            model.module(torch.zeros(1, *model.input_shape(height, width)))
        first = next((block for block in blocks if block.number not in refused), blocks[0])
        _, heads, tokens, size = shapes.get(first.number) or next(iter(shapes.values()))
        self.layout = Layout(
            model=model.name,
            num_blocks=len(blocks),
            refused=refused,
            tokens=tokens,
            heads=heads,
            head_size=size,
            channels=heads * size,
            prefix_tokens=first.prefix_tokens,
            patches=_find_grid(model, first, (height, width), tokens),
            resolution=(height, width),
            frames=first.frames,
            towers=model.towers,
            tower=tower,
        )
        names = (*model.token_outputs, *model.output_names)
        self._fidelity_output = self._first_reached(names, (height, width)) if model.towers else names[0]

    def _first_reached(self, names: Sequence[str], size: tuple[int, int]) -> str:
        """The first of some outputs that the blocks planned for have a part in: other towers may have outputs of their own."""
        pixels = torch.ones(1, *self.model.input_shape(*size))

        def silence(call: AttentionCall) -> Tensor | None:
            return None if call.block in self.layout.refused else torch.zeros_like(call.out)

        with torch.inference_mode():
            whole = dict(zip(self.model.output_names, self.model.module(pixels), strict=True))
            with observed(self.model.module, silence):
                without = dict(zip(self.model.output_names, self.model.module(pixels), strict=True))
        return next((name for name in names if not torch.equal(whole[name], without[name])), names[0])

    def run(self, pixels: NDArray[np.float32], plan: Plan | None) -> Arrays:
        """See `Subject.run`."""
        if plan is None:
            return run_torch(self.model, pixels[None])
        with patched(self.model, plan):
            return run_torch(self.model, pixels[None])

    def tokens(self, outputs: Arrays) -> NDArray[np.float32]:
        """See `Subject.tokens`."""
        tokens: NDArray[np.float32] = outputs[self._fidelity_output].astype(np.float32)
        return tokens[0] if self._fidelity_output in self.model.token_outputs else tokens.reshape(1, -1)

    def kinds(self, outputs: Arrays) -> OutputKinds:
        """See `Subject.kinds`."""
        names, prefix = self.model.token_outputs, self.layout.prefix_tokens
        bare = tuple(name for name in names if self.layout.prefix_among(outputs[name].shape[1]) < prefix)
        return OutputKinds(self.model.map_outputs, names, prefix, bare)

    def fingerprint(self) -> str:
        """See `Subject.fingerprint`."""
        digest = hashlib.sha256()
        for name, tensor in self.model.module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def look(self, pixels: NDArray[np.float32], visit: Callable[[BlockView], None]) -> None:
        """See `Subject.look`."""
        calls: dict[int, AttentionCall] = {}
        errors: dict[int, Tensor] = {}
        hidden: dict[int, Tensor] = {}
        refused = self.layout.refused

        def keep(call: AttentionCall) -> Tensor | None:
            if call.block in refused:
                return None
            calls[call.block] = call
            errors[call.block] = torch.zeros_like(call.out, requires_grad=True)
            return call.out + errors[call.block]

        def entering(block: int, states: Tensor) -> None:
            hidden[block] = states.detach()

        parameters = [parameter for parameter in self.model.module.parameters() if parameter.requires_grad]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            with torch.enable_grad(), observed(self.model.module, keep, entering=entering):
                tokens = self._tokens(torch.from_numpy(pixels[None]))
                patches = tokens[self.layout.prefix_among(len(tokens)) :]
                directions = torch.nn.functional.normalize(patches, dim=-1)
                gradients = _gradients(directions, errors, seed=0)
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)
        with torch.inference_mode():
            for number in sorted(calls):
                call, gradient = calls[number], gradients[number]
                view = BlockView(
                    number,
                    call.query.detach(),
                    call.key.detach(),
                    call.value.detach(),
                    call.out.detach(),
                    call.scale,
                    hidden.get(number),
                    _root(gradient),
                    _coherence(gradient),
                    gradient,
                )
                visit(view)

    def _tokens(self, pixels: Tensor) -> Tensor:  # [T, C]
        tokens = dict(zip(self.model.output_names, self.model.module(pixels), strict=True))[self._fidelity_output]
        return tokens[0] if self._fidelity_output in self.model.token_outputs else tokens.reshape(1, -1)


def _find_grid(model: LoadedModel, block: AttentionBlock, size: tuple[int, int], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the patches of a block's tower, at a size of image; None where the tokens are on no grid that is known."""
    if block.frames > 1:
        return None
    grids = [model.patches(*size)]
    if block.patches is not None:  # at the model's own size; towers have patches of different sizes
        rows, columns = block.patches
        grids.append((rows * size[0] // model.native_size[0], columns * size[1] // model.native_size[1]))
    side = math.isqrt(max(tokens - block.prefix_tokens, 0))
    if model.towers and size[0] == size[1]:  # of pieces of the image, or of the image at another scale
        grids.append((side, side))
    return next((grid for grid in grids if math.prod(grid) + block.prefix_tokens == tokens), None)


def _gradients(directions: Tensor, errors: dict[int, Tensor], seed: int) -> dict[int, Tensor]:  # each [K, H, N, D]
    """Gradients of K random combinations of the normalised tokens `[T, C]` by the output of each block's attention.

    With `f` the normalised tokens, the mean of `1 - cosine` is `|df|^2 / 2T`. For standard normal `u` the mean of `(u . df)^2` is
    `|df|^2`, and `u . df` is to first order the gradient of `u . f` times the error.
    """
    numbers = list(errors)
    generator = torch.Generator().manual_seed(seed)
    rows: dict[int, list[Tensor]] = {number: [] for number in numbers}
    for probe in range(PROBES):
        direction = torch.randn(directions.shape, generator=generator) / (2 * directions.shape[0]) ** 0.5
        combined = (direction * directions).sum()
        gradients = torch.autograd.grad(combined, [errors[n] for n in numbers], retain_graph=probe < PROBES - 1)
        for number, gradient in zip(numbers, gradients, strict=True):
            rows[number].append(gradient[0])
    return {number: torch.stack(parts) for number, parts in rows.items()}


def _root(gradients: Tensor) -> Tensor:  # [K, H, N, D] -> [H, D, D]
    """A root of the mean over probes and tokens of `gradient gradient^T`."""
    probes, _, tokens, _ = gradients.shape
    metric = torch.einsum("khnd,khne->hde", gradients, gradients) / (probes * tokens)
    values, vectors = torch.linalg.eigh(metric)
    return vectors * values.clamp(min=0).sqrt()[..., None, :]


def _coherence(gradients: Tensor) -> Tensor:  # [K, H, N, D] -> [H]
    """Squared norm of the sum of the tokens' gradients over the sum of their squared norms: 1 were they independent."""
    together = gradients.sum(dim=2).square().sum(dim=(0, 2))
    return together / gradients.square().sum(dim=(0, 2, 3)).clamp(min=1e-30)
