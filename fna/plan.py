"""The plan: which attention blocks become FNA, with how many landmarks, chosen how. A small, versioned JSON."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from fna.block_numbers import format_layers, parse_layers
from fna.chebyshev import CHEBYSHEV, ChebyshevSteps, CoreChoice, CoreName, choose_core
from fna.correction import Correction
from fna.errors import InputFileError, InvalidPlanError, describe_validation_error
from fna.plan_towers import BLOCK_LISTS, check_towers, name_towers_of_blocks, number_through
from fna.samplers import DEFAULT_SAMPLER, all_samplers, check_sampler_name, find_sampler

SamplerName = Annotated[str, AfterValidator(check_sampler_name)]
Method = Literal["weighted", "published"]

DEFAULT_LANDMARKS = 64
DEFAULT_METHOD: Method = "weighted"
"""Of the commands and of `uniform_plan`; what a plan file means that does not say is said by its fields below."""
Feature = Literal["input", "query", "key", "value"]
METHODS: tuple[str, ...] = get_args(Method)

ITERATIONS_OF_VERSION_1 = 6
"""What a plan file of version 1, or an FNA node of an ONNX file, means that does not say its iterations. It never changes, whatever
the method's default becomes."""

SharingKey = tuple[int, str, str, int | None, int | None]


class BlockPlan(CoreChoice):
    """One FNA block. Blocks that a plan does not list stay exact.

    Attributes:
        block: its number.
        landmarks: S.
        sampler: how landmarks are chosen.
        feature: what samplers that look at features look at.
        heads: the heads that become FNA, ascending; the others stay exact. None is all of them.
        iterations: Newton-Schulz iterations here; None is the plan's.
        resample: choose landmarks anew in this block; None is the plan's.
        correction: see `Correction`; None for none.
    """

    block: int = Field(ge=0)
    landmarks: int = Field(ge=1)
    sampler: SamplerName = DEFAULT_SAMPLER
    feature: Feature = "input"
    heads: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    iterations: int | None = Field(default=None, ge=1, le=20)
    resample: bool | None = None
    correction: Correction | None = None

    @model_validator(mode="after")
    def _check_heads(self) -> BlockPlan:
        if self.heads is not None and list(self.heads) != sorted(set(self.heads)):
            raise ValueError(f"heads must be listed once each, ascending, but they are {list(self.heads)}")
        if self.heads is not None and self.correction is not None and len(self.correction.gains) != len(self.heads):
            raise ValueError(
                f"correction has kernels for {len(self.correction.gains)} heads, but heads lists {len(self.heads)}"
            )
        return self


class FocalBlockPlan(BaseModel):
    """One block of focal attention, all heads of it; see `fna.focal`.

    Attributes:
        block: its number.
        tile: side of the tiles of queries, in patches.
        levels: (size, gap) of the cells of patches that are sampled, finest first.
        hot: keys that are exact for all tiles.
        seed: of the draw.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: int = Field(ge=0)
    tile: int = Field(default=8, ge=1)
    levels: tuple[tuple[int, int], ...] = ((1, 0), (2, 2))
    hot: int = Field(default=16, ge=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_lists(self) -> FocalBlockPlan:
        from fna.focal_keys import check_focal  # not above: it needs PyTorch

        check_focal((self.tile, self.tile), self.tile, self.levels, self.seed)
        return self


class TokenRange(BaseModel):
    """Some tokens in a range of blocks; see `fna.special_tokens`.

    Attributes:
        blocks: block numbers, as for `parse_layers`.
        tokens: `artifact` or `massive`, found in every image at the first of the blocks, or token indices.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    blocks: str
    tokens: Literal["artifact", "massive"] | tuple[NonNegativeInt, ...]


class MaskPlan(TokenRange):
    """Tokens that nobody attends to, in a range of blocks, FNA or exact.

    Attributes:
        sink: let the masked tokens themselves attend to all tokens.
    """

    sink: bool = False


def _iterations_of_the_method() -> int:
    from fna.attention import NEWTON_SCHULZ_ITERATIONS  # not above: it needs PyTorch

    return NEWTON_SCHULZ_ITERATIONS


class Plan(CoreChoice):
    """How a model's attention is to be replaced; docs/design.md says what the method and the samplers are.

    Attributes:
        version: of this format: 4 with towers, else 3 where a core is named, here or in a block, else 2 with focal blocks, else 1.
        num_blocks: attention blocks of the model the plan is for, of all its towers.
        towers: for a model of several towers, the numbers of each one's blocks in the whole model. A file numbers blocks tower by
            tower and names the tower, `{"tower": "vision", "block": 3}`; here their numbers are those in the whole model.
        blocks: the blocks that become FNA, ascending.
        focal: the blocks that become focal attention, ascending.
        method: `weighted` (landmark weights and exact rows) or `published` (neither).
        iterations: Newton-Schulz iterations; the method's own number for a new plan, `ITERATIONS_OF_VERSION_1` for a file without.
        prefix_tokens: class and register tokens at the front; None means: detect them.
        resample: choose landmarks anew in every block instead of once for all blocks that share them.
        seed: for the `random` sampler.
        masks: tokens masked as keys, per block range; no block in two of them.
        landmarks_include: tokens that are landmarks whatever the sampler, per range of FNA blocks; see
            `fna.samplers.common.roles`. Found at the
            first FNA block of the range.
        landmarks_exclude: tokens that are not, likewise; a token that is also included is a landmark.
        model: the model that it was made for; None fits any of as many blocks.
        resolution: height and width in pixels that it was made for; None fits any.
        patches: rows and columns of patches, for what depends on where a token is (samplers, corrections); None infers a square.
        made_from: free-form record of what the plan was made from.
    """

    version: Literal[1, 2, 3, 4] = 1
    num_blocks: int = Field(ge=1)
    towers: dict[str, str] = Field(default_factory=dict)
    blocks: tuple[BlockPlan, ...] = ()
    focal: tuple[FocalBlockPlan, ...] = ()
    method: Method = "weighted"
    iterations: int = Field(default_factory=_iterations_of_the_method, ge=1, le=20)
    prefix_tokens: int | None = Field(default=None, ge=0)
    resample: bool = False
    seed: int = 0
    masks: tuple[MaskPlan, ...] = ()
    landmarks_include: tuple[TokenRange, ...] = ()
    landmarks_exclude: tuple[TokenRange, ...] = ()
    model: str | None = None
    resolution: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    patches: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    made_from: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _read_what_a_file_leaves_out(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, dict):
            return values
        if info.mode == "json":
            return number_through({"version": 1, "iterations": ITERATIONS_OF_VERSION_1, **values})
        blocks = (block if isinstance(block, dict) else vars(block) for block in values.get("blocks", ()))
        cores = any(settings.get("core") for settings in (values, *blocks))
        return {"version": 4 if values.get("towers") else 3 if cores else 2 if values.get("focal") else 1, **values}

    @model_serializer(mode="wrap")
    def _leave_out_what_older_versions_have_not(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = super()._leave_out_what_older_versions_have_not(dump)
        if not self.focal:
            fields.pop("focal", None)
        if not self.towers:
            fields.pop("towers", None)
            return fields
        for key in set(BLOCK_LISTS) & fields.keys():
            fields[key] = name_towers_of_blocks(fields[key], self.towers, self.num_blocks)
        return fields

    @model_validator(mode="after")
    def _check_blocks(self) -> Plan:
        for key, planned in (("blocks", self.blocks), ("focal", self.focal)):
            numbers = [block.block for block in planned]
            if numbers != sorted(set(numbers)):
                raise ValueError(f"{key} must be listed once each, ascending, but they are {numbers}")
            if numbers and numbers[-1] >= self.num_blocks:
                raise ValueError(f"block {numbers[-1]} is listed, but the model has blocks 0 to {self.num_blocks - 1}")
        both = sorted({block.block for block in self.blocks} & {block.block for block in self.focal})
        if both:
            raise ValueError(f"block {both[0]} is listed under blocks and under focal, but it is one of both at most")
        if self.focal and self.version == 1:
            raise ValueError("focal blocks are listed, but version is 1; plans with them have version 2")
        if self.towers:
            self._check_towers()
        named = [choice for choice in (self, *self.blocks) if choice.core is not None]
        if named and self.version < 3:
            raise ValueError(f"a core is named, but version is {self.version}; plans that name one have version 3")
        if self.method == "published" and any(choice.chebyshev for choice in named):
            raise ValueError("core is chebyshev, but the published method has newton_schulz; use the weighted method")
        for key in ("masks", "landmarks_include", "landmarks_exclude"):
            self._check_ranges(key, getattr(self, key))
        return self

    def _check_towers(self) -> None:
        if self.version < 4:
            raise ValueError(f"towers are listed, but version is {self.version}; plans with them have version 4")
        check_towers(self.towers, self.num_blocks)

    def _check_ranges(self, key: str, ranges: tuple[TokenRange, ...]) -> None:
        seen: set[int] = set()
        for place, token_range in enumerate(ranges):
            try:
                numbers = parse_layers(token_range.blocks, self.num_blocks, self.towers)
            except InvalidPlanError as error:
                raise ValueError(f"{key}.{place}.blocks: {error}") from None
            twice = next((number for number in numbers if number in seen), None)
            if twice is not None:
                raise ValueError(f"block {twice} is in more than one of the {key}, but at most one is needed")
            seen.update(numbers)
            if key != "masks":
                self._check_landmark_range(f"{key}.{place}.blocks", [n for n in numbers if self.find(n) is not None])

    def _check_landmark_range(self, key: str, numbers: list[int]) -> None:
        if not numbers:
            raise ValueError(f"{key}: none of these blocks is FNA, so they have no landmarks; name FNA blocks")
        for block in (self.find(number) for number in numbers):
            if block is not None and find_sampler(block.sampler).guided is None:
                guided = ", ".join(sampler.name for sampler in all_samplers() if sampler.guided is not None)
                raise ValueError(
                    f"{key}: the landmarks of block {block.block} are fixed by its sampler {block.sampler}; choose one of "
                    f"{guided} there"
                )

    @property
    def exact_rows(self) -> bool:
        """Whether the landmark tokens' own rows are written exactly."""
        return self.method == "weighted"

    def sharing_key(self, planned: BlockPlan) -> SharingKey:
        """Blocks with equal keys use the landmarks of the first of them, unless the plan resamples."""
        included, excluded = (self.find_landmark_range(key, planned.block) for key in ("include", "exclude"))
        first = (included and included[0], excluded and excluded[0])
        return (planned.landmarks, planned.sampler, planned.feature, *first)

    def resamples(self, planned: BlockPlan) -> bool:
        """Whether a block chooses its landmarks anew."""
        return self.resample if planned.resample is None else planned.resample

    def iterations_of(self, planned: BlockPlan) -> int:
        """Newton-Schulz iterations of a block."""
        return self.iterations if planned.iterations is None else planned.iterations

    def chebyshev_of(self, planned: BlockPlan) -> ChebyshevSteps | None:
        """Chebyshev steps of a block, None for Newton-Schulz."""
        return self.chebyshev if planned.core is None else planned.chebyshev

    @property
    def needs_positions(self) -> bool:
        """Whether something in the plan depends on where on the image a token is, and so on the image's shape."""
        return bool(self.focal) or any(
            block.correction is not None or find_sampler(block.sampler).needs_positions for block in self.blocks
        )

    def check_fits(self, model: str, resolution: tuple[int, int] | None) -> None:
        """Refuse a model or a resolution that the plan was not made for.

        A plan made from PyTorch may be tried on an ONNX file, which has another name, and the other way round.

        Raises:
            InvalidPlanError: naming both.
        """
        same_kind = self.model is not None and self.model.endswith(".onnx") == model.endswith(".onnx")
        if same_kind and self.model != model:
            raise InvalidPlanError(
                f"the plan is for model {self.model}, but the model is {model}; make a plan for it with fna plan"
            )
        if self.resolution is not None and resolution is None:
            raise InvalidPlanError(
                f"the plan is for {_size(self.resolution)} images, but height and width are left open; trace it at that size"
            )
        if self.resolution is not None and resolution is not None and self.resolution != tuple(resolution):
            raise InvalidPlanError(
                f"the plan is for {_size(self.resolution)} images, but the resolution is {_size(resolution)}; "
                f"use --resolution {_size(self.resolution)}, or make a plan for {_size(resolution)} with fna plan"
            )

    def for_any_size(self) -> Plan:
        """Return the plan for images of any size: for timing it and probing it at others than the one it was made for."""
        return self.model_copy(update={"resolution": None, "patches": None})

    def find(self, block: int) -> BlockPlan | None:
        """Return the plan of one block, or None where the block stays exact."""
        return next((planned for planned in self.blocks if planned.block == block), None)

    def find_focal(self, block: int) -> FocalBlockPlan | None:
        """Return the plan of one block of focal attention, or None."""
        return next((planned for planned in self.focal if planned.block == block), None)

    @property
    def replaced_blocks(self) -> list[int]:
        """The blocks whose attention is FNA or focal, ascending."""
        return sorted([block.block for block in self.blocks] + [block.block for block in self.focal])

    def only(self, numbers: Collection[int]) -> Plan:
        """Return the plan with some of its blocks replaced, and the others exact."""
        return self.model_copy(
            update={
                "blocks": tuple(block for block in self.blocks if block.block in numbers),
                "focal": tuple(block for block in self.focal if block.block in numbers),
            }
        )

    def describe_blocks(self) -> str:
        """Say in a line which blocks are what: `FNA blocks 6-11 of 12, S=64, grid, weighted; focal blocks 1-3, ...`."""
        counts = "/".join(str(count) for count in sorted({block.landmarks for block in self.blocks}))
        samplers = "/".join(sorted({block.sampler for block in self.blocks}))
        cores = {self.chebyshev_of(block) for block in self.blocks}
        steps = "/".join(str(count) for count in sorted({core.steps for core in cores if core is not None}))
        core = f", {steps} Chebyshev steps" * bool(steps) + " or Newton-Schulz" * (len(cores) > 1 and None in cores)
        settings = f", S={counts}, {samplers}, {self.method}{core}" if self.blocks else ""
        numbers = format_layers(block.block for block in self.blocks)
        parts = [f"FNA blocks {numbers} of {self.num_blocks}{settings}"]
        if self.focal:
            sides = "/".join(str(side) for side in sorted({block.tile for block in self.focal}))
            hot = "/".join(str(count) for count in sorted({block.hot for block in self.focal}))
            numbers = format_layers(block.block for block in self.focal)
            parts.append(f"focal blocks {numbers}, tiles of {sides}, {hot} hot keys")
        return "; ".join(parts)

    @property
    def masked_blocks(self) -> set[int]:
        """The blocks in which tokens are masked."""
        return {number for mask in self.masks for number in parse_layers(mask.blocks, self.num_blocks, self.towers)}

    def find_mask(self, block: int) -> tuple[int, MaskPlan] | None:
        """Return what is masked in one block, and the first block of its range, where the tokens are found; or None."""
        for mask in self.masks:
            numbers = parse_layers(mask.blocks, self.num_blocks, self.towers)
            if block in numbers:
                return numbers[0], mask
        return None

    def find_landmark_range(self, which: Literal["include", "exclude"], block: int) -> tuple[int, TokenRange] | None:
        """Return what the landmarks of one FNA block include or exclude, and the block where it is found; or None."""
        for token_range in self.landmarks_include if which == "include" else self.landmarks_exclude:
            numbers = [
                n for n in parse_layers(token_range.blocks, self.num_blocks, self.towers) if self.find(n) is not None
            ]
            if block in numbers:
                return numbers[0], token_range
        return None

    def dump_json(self) -> str:
        """Return the plan as one line of JSON."""
        return self.model_dump_json()


def _size(resolution: tuple[int, int]) -> str:
    return f"{resolution[0]}x{resolution[1]}"


def uniform_plan(
    num_blocks: int,
    *,
    layers: str | None = None,
    towers: dict[str, str] | None = None,
    landmarks: int = DEFAULT_LANDMARKS,
    sampler: str = DEFAULT_SAMPLER,
    method: Method = DEFAULT_METHOD,
    core: CoreName | None = None,
    steps: int | None = None,
    low: float | None = None,
    **settings: Any,
) -> Plan:
    """Make a plan that treats all chosen blocks alike.

    Args:
        num_blocks: attention blocks of the model.
        layers: as for `parse_layers`.
        towers: of the model, as for `parse_layers`.
        landmarks: S for every chosen block.
        sampler: the sampler for every chosen block.
        method: `weighted` or `published`.
        core: `newton_schulz` or `chebyshev`; None is the usual one for S landmarks (`fna.chebyshev.default_core`).
        steps: of chebyshev; None is as many as are usual for S landmarks.
        low: the lowest eigenvalue that they aim at, likewise.
        settings: further fields of `Plan`.

    Raises:
        InvalidPlanError: for blocks that the model does not have, or values out of range.
    """
    numbers = parse_layers(layers, num_blocks, towers)
    if towers:
        settings["towers"] = towers
    try:
        blocks = tuple(BlockPlan(block=number, landmarks=landmarks, sampler=sampler) for number in numbers)
        chosen = choose_core(landmarks, method, core, steps, low)
        if chosen is not None:
            settings |= {"core": CHEBYSHEV, "steps": chosen.steps, "low": chosen.low}
        return Plan(num_blocks=num_blocks, blocks=blocks, method=method, **settings)
    except ValidationError as error:
        raise InvalidPlanError(describe_validation_error("plan", error)) from None


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        InputFileError: if the file cannot be read.
        InvalidPlanError: if it is not a plan; the message names the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"plan {path} cannot be read: {error}") from None
    return parse_plan(text, str(path))


def parse_plan(text: str, name: str = "plan") -> Plan:
    """Parse a plan from JSON text; `name` says in errors where it came from.

    Raises:
        InvalidPlanError: naming the key that is wrong.
    """
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise InvalidPlanError(describe_validation_error(name, error)) from None
