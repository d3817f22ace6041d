"""Exact attention against FNA of the same model: timed in turns in one process, on whatever is here."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from fna.errors import InputFileError, InvalidLandmarksError
from fna.export.sources.loading import LoadedModel, check_resolution
from fna.machine import describe_machine
from fna.patching import find_attention_blocks
from fna.plan import Plan
from fna.precision import Precision
from fna.validate.bench import Backend
from fna.validate.bench.backends import OPENERS, Setting, forms_of
from fna.validate.bench.counts import Counts, count
from fna.validate.bench.timing import Timing, time_in_turns
from fna.validate.budget.chain import Say

WARM_UP_RUNS = 2
QUICK_RUNS = 3
QUICK_SHARES = (0.43, 0.7, 1.0)
"""Of the native resolution, for `--bench quick`."""


class BenchRow(BaseModel):
    """Exact attention and FNA at one resolution.

    Attributes:
        backend: what ran the models.
        height: of the images, in pixels.
        width: of the images, in pixels.
        tokens: tokens per image, prefix tokens included.
        landmarks: S.
        blocks: how many blocks were FNA.
        baseline: the fastest form of exact attention that the backend offers, which the speed-up is against.
        dense: latency of that form.
        exact_forms: latency of each form that was timed, taking turns, by its name.
        fna: latency by the plan, in the fastest form.
        fna_form: that form.
        speedup: median of dense over median of FNA.
        counts: operations and bytes; None for models of several towers or images, whose blocks differ in their tokens.
    """

    model_config = ConfigDict(frozen=True)

    backend: Backend
    height: int
    width: int
    tokens: int
    landmarks: int
    blocks: int
    baseline: str
    dense: Timing
    exact_forms: dict[str, Timing] = {}
    fna: Timing
    fna_form: str = ""
    speedup: float
    counts: Counts | None = None


class BreakEven(BaseModel):
    """From how many tokens on FNA is faster.

    Attributes:
        landmarks: S.
        tokens: interpolated between two measured sizes, on logarithmic axes; None if it lies outside of them.
        reason: what was seen instead.
    """

    model_config = ConfigDict(frozen=True)

    landmarks: int
    tokens: float | None
    reason: str


class BenchResult(BaseModel):
    """What `fna bench` writes.

    Attributes:
        model: its name.
        backend: what ran it.
        batch: images per run.
        precision: of weights and activations.
        runs: timed runs of each model.
        blocks: how many blocks were FNA.
        num_blocks: how many attention blocks the model has.
        machine: what it was run on.
        plan: the plan with the first S.
        rows: one per resolution and S.
        break_even: one per S.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    backend: Backend
    batch: int
    precision: str
    runs: int
    blocks: int
    num_blocks: int
    machine: dict[str, Any]
    plan: dict[str, Any]
    rows: tuple[BenchRow, ...]
    break_even: tuple[BreakEven, ...]


def bench(
    model: LoadedModel,
    plans: Sequence[Plan],
    sizes: Sequence[tuple[int, int]],
    *,
    backend: Backend = "onnxruntime",
    runs: int = 7,
    batch: int = 1,
    precision: Precision = "fp32",
    warm_up: int = WARM_UP_RUNS,
    launches: int = 10,
    on_step: Say = lambda *_progress: None,
) -> BenchResult:
    """Time a model dense and by each plan, each in every form that the backend offers, taking turns; the fastest form counts.

    Args:
        model: to be timed.
        plans: which blocks are FNA; usually one per S.
        sizes: heights and widths of the images, in pixels.
        backend: what runs the models.
        runs: timed runs of each, after warm-up.
        batch: images per run.
        precision: of weights and activations.
        warm_up: runs of each before those that are timed.
        launches: of an engine in each of its runs.
        on_step: called with what is being done, how much of it is done, and how much there is.

    Raises:
        ModelSourceError: for a resolution that the model does not take.
        InvalidLandmarksError: for more landmarks than tokens at a resolution.
        InvalidPlanError: for a plan that was made for another model or resolution.
        MissingCapabilityError: if this machine lacks the backend.
    """
    for size in sizes:
        check_resolution(model, *size)
        for plan in plans:
            plan.check_fits(model.name, size)
        _check_landmarks(model, plans, size)
    open_model, forms = OPENERS[backend], forms_of(backend, model)
    rows = []
    for place, size in enumerate(sorted(set(sizes))):
        on_step(f"preparing {format_size(*size)}", place, len(sizes))
        placed = [_place(plan, model, size) for plan in plans]
        dense_plan = plans[0].model_copy(update={"blocks": (), "focal": ()})
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(model, size, batch, precision, Path(folder), launches)
            opened = [open_model(setting, plan, form) for plan in (dense_plan, *placed) for form in forms]
            on_step(f"timing at {format_size(*size)}", place, len(sizes))
            timings = time_in_turns(opened, runs, warm_up, batch)
            for timed in opened:
                timed.close()
        by_form = [
            {form.name: timing for form, timing in zip(forms, group, strict=True)}
            for group in (timings[start : start + len(forms)] for start in range(0, len(timings), len(forms)))
        ]
        rows += [
            _row(model, plan, size, backend, precision, by_form[0], of_plan)
            for plan, of_plan in zip(placed, by_form[1:], strict=True)
        ]
    return BenchResult(
        model=model.name,
        backend=backend,
        batch=batch,
        precision=precision,
        runs=runs,
        blocks=len(plans[0].replaced_blocks),
        num_blocks=plans[0].num_blocks,
        machine=describe_machine(),
        plan=plans[0].model_dump(mode="json"),
        rows=tuple(rows),
        break_even=find_break_even(rows),
    )


def format_size(height: int, width: int) -> str:
    """Write a size as people do: 518 for a square, else 518x784."""
    return str(height) if height == width else f"{height}x{width}"


def _place(plan: Plan, model: LoadedModel, size: tuple[int, int]) -> Plan:
    """The plan with rows and columns of patches at a size, where something in it depends on them; towers have their own."""
    if plan.patches is not None or plan.towers or not plan.needs_positions:
        return plan
    return plan.model_copy(update={"patches": model.patches(*size)})


def _check_landmarks(model: LoadedModel, plans: Sequence[Plan], size: tuple[int, int]) -> None:
    most = max((entry.landmarks for plan in plans for entry in plan.blocks), default=0)
    tokens = math.prod(model.patches(*size)) + find_attention_blocks(model.module)[0].prefix_tokens
    if most > tokens and not model.towers and model.frames is None:
        raise InvalidLandmarksError(
            f"{most} landmarks were asked for, but at resolution {format_size(*size)} there are only {tokens} tokens; ask for fewer"
        )


def bench_quickly(model: LoadedModel, plan: Plan, size: tuple[int, int], on_step: Say) -> dict[str, Any]:
    """Time a model in PyTorch at up to three sizes, a few runs each, for the report."""
    patch = model.patch_size
    sizes = {(round(size[0] * share / patch) * patch, round(size[1] * share / patch) * patch) for share in QUICK_SHARES}
    landmarks = max((block.landmarks for block in plan.blocks), default=1)
    hot, tile = (max((getattr(block, name) for block in plan.focal), default=0) for name in ("hot", "tile"))
    grids = {tried: model.patches(*tried) for tried in sizes}
    fitting = [
        tried for tried, grid in grids.items() if math.prod(grid) > max(landmarks, hot) and min(grid) >= tile
    ] or [size]
    chosen = sorted(fitting) if model.any_resolution else [size]
    result = bench(model, [plan.for_any_size()], chosen, backend="torch", runs=QUICK_RUNS, warm_up=1, on_step=on_step)
    data: dict[str, Any] = json.loads(result.model_dump_json())
    return data


def read_bench(path: Path) -> dict[str, Any]:
    """Read the JSON file of `fna bench`.

    Raises:
        InputFileError: if it is none.
    """
    try:
        result = BenchResult.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(
            f"{path} cannot be read: {error.strerror}; give a JSON file of fna bench, or quick"
        ) from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputFileError(f"{path} is no JSON file of this version's fna bench ({reason})") from None
    data: dict[str, Any] = json.loads(result.model_dump_json())
    return data


def find_break_even(rows: Sequence[BenchRow]) -> tuple[BreakEven, ...]:
    """Return for each S where the two curves meet, between two measured sizes."""
    crossings = []
    for landmarks in sorted({row.landmarks for row in rows}):
        chosen = sorted((row for row in rows if row.landmarks == landmarks), key=lambda row: row.tokens)
        crossings.append(_break_even(landmarks, [(row.tokens, row.speedup) for row in chosen]))
    return tuple(crossings)


def _break_even(landmarks: int, points: Sequence[tuple[int, float]]) -> BreakEven:
    (first, first_speedup), (last, last_speedup) = points[0], points[-1]
    if first_speedup >= 1:
        return BreakEven(
            landmarks=landmarks, tokens=None, reason=f"FNA is faster already at {first} tokens, the fewest measured"
        )
    for (left, slower), (right, faster) in itertools.pairwise(points):
        if slower < 1 <= faster:
            share = -math.log(slower) / (math.log(faster) - math.log(slower))
            tokens = math.exp(math.log(left) + share * (math.log(right) - math.log(left)))
            return BreakEven(landmarks=landmarks, tokens=round(tokens, 1), reason=f"between {left} and {right} tokens")
    reason = f"exact attention is faster up to {last} tokens, the most measured ({last_speedup:.2f} times the speed)"
    return BreakEven(landmarks=landmarks, tokens=None, reason=reason)


class BlockSize(NamedTuple):
    """One attention block at one size of image: its height and width in pixels, N, H, D."""

    height: int
    width: int
    tokens: int
    heads: int
    head_size: int


def block_sizes(model: LoadedModel, sizes: Sequence[tuple[int, int]]) -> list[BlockSize]:
    """The sizes of a model's first attention block, by heights and widths of images.

    Raises:
        ModelSourceError: for a resolution that the model does not take.
    """
    block = find_attention_blocks(model.module)[0]
    heads, head_size = block.heads, block.head_size
    found = []
    for size in sizes:
        check_resolution(model, *size)
        tokens = math.prod(model.patches(*size)) + block.prefix_tokens
        found.append(BlockSize(*size, tokens, heads, head_size))
    return found


def _row(
    model: LoadedModel,
    plan: Plan,
    size: tuple[int, int],
    backend: Backend,
    precision: str,
    exact: dict[str, Timing],  # by the form's name
    planned: dict[str, Timing],
) -> BenchRow:
    prefix = plan.prefix_tokens
    if prefix is None:
        prefix = find_attention_blocks(model.module)[0].prefix_tokens
    full = plan.model_copy(update={"prefix_tokens": prefix})
    baseline, fna_form = (min(timings, key=lambda name: timings[name].median) for timings in (exact, planned))
    return BenchRow(
        backend=backend,
        height=size[0],
        width=size[1],
        tokens=math.prod(model.patches(*size)) + prefix,
        landmarks=max((entry.landmarks for entry in plan.blocks), default=0),
        blocks=len(plan.replaced_blocks),
        baseline=baseline,
        dense=exact[baseline],
        exact_forms=exact,
        fna=planned[fna_form],
        fna_form=fna_form,
        speedup=exact[baseline].median / planned[fna_form].median,
        counts=None if model.towers or model.frames else count(model, full, *size, precision),
    )
