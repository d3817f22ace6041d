"""`fna graft` as a function: load, scan, decide, rewrite, prove, write."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
from onnx import ModelProto

from fna.chebyshev import CoreName
from fna.errors import CheckFailedError, FnaError, InputFileError, InvalidPlanError
from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.surgery.graph.files import (
    export_model,
    folder_of,
    import_model,
    load_model,
    one_line,
    open_graph,
    original_model,
    put_weights_in,
    was_sorted,
)
from fna.export.surgery.graph.shapes import Shape, ShapeConflictError, ShapePoint
from fna.export.surgery.graph.sizes import find_points
from fna.export.surgery.graph.view import GraphView
from fna.export.surgery.output import (
    check_output,
    describe_graft,
    external_files,
    find_image_size,
    write_beside_its_data,
)
from fna.export.surgery.prove import Proof, prove_blocks, prove_file
from fna.export.surgery.recognise.rows import Decision, Row
from fna.export.surgery.recognise.scan import MALFORMED, scan
from fna.export.surgery.rewrite.rewrite import Rewritten, rewrite
from fna.files import file_sha256
from fna.plan import DEFAULT_LANDMARKS, DEFAULT_METHOD, Plan, uniform_plan
from fna.samplers import DEFAULT_SAMPLER

Progress = Callable[[str], None]

LARGE_FILE_BYTES = 1 << 28
"""From here on memory counts for more than the sixth of a second that looking for cycles takes."""


@dataclass(frozen=True)
class GraftOptions:
    """What to replace and how.

    Attributes:
        layers: block numbers of the table, as in `6-11`, or `all`.
        landmarks: S.
        sampler: how landmarks are chosen.
        method: `weighted` or `published`.
        core: as for `uniform_plan`, and likewise `steps` and `low`.
        plan: a whole plan; takes the place of all the above.
        prefix_tokens: class and register tokens; None detects them.
        seed: for the random sampler.
        input_shapes: sizes to examine the file at, by input name, where it leaves them open.
        resolution: change the input's height and width first.
        check: prove each block.
        strict: fail if any attention was refused.
    """

    layers: str = "all"
    landmarks: int = DEFAULT_LANDMARKS
    sampler: str = DEFAULT_SAMPLER
    method: str = DEFAULT_METHOD
    core: CoreName | None = None
    steps: int | None = None
    low: float | None = None
    plan: Plan | None = None
    prefix_tokens: int | None = None
    seed: int = 0
    input_shapes: dict[str, Shape] = field(default_factory=dict)
    resolution: tuple[int, int] | None = None
    check: bool = True
    strict: bool = False


@dataclass
class GraftResult:
    """What became of a file."""

    rows: list[Row]
    model: ModelProto | None
    plan: Plan | None
    proof: Proof | None
    prefix_tokens: int | None
    features: dict[int, str]
    sha256: str
    notes: list[str] = field(default_factory=list)
    data_sha256: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def graph(self) -> gs.Graph:
        """The rewritten model as an onnx-graphsurgeon graph."""
        assert self.model is not None, "a dry run makes no model"
        return import_model(self.model, self.folder)

    def count(self, decision: Decision) -> int:
        """How many blocks were replaced, kept or refused."""
        return sum(row.decision is decision for row in self.rows)

    @property
    def replaced(self) -> int:
        """Blocks that are FNA now."""
        return self.count(Decision.REPLACED)

    @property
    def refused(self) -> int:
        """Blocks that are not plain self-attention, or failed the proof."""
        return self.count(Decision.REFUSED)

    def describe_proof(self) -> str:
        """What the check found, in one line."""
        if self.proof is None or not self.proof.block_errors:
            return "not checked"
        parts = [f"recovered attention within {max(self.proof.block_errors.values()):.1e}"]
        if self.proof.fna_errors:
            parts.append(f"FNA nodes within {max(self.proof.fna_errors.values()):.1e} of PyTorch")
        return "checked: " + ", ".join(parts) + " (relative)"

    def as_dict(self) -> dict[str, Any]:
        """The result as `--json` has it."""
        errors: dict[int, dict[str, float]] = {}
        if self.proof is not None:
            for number, error in self.proof.block_errors.items():
                errors.setdefault(number, {})["block_error"] = error
            for number, error in self.proof.fna_errors.items():
                errors.setdefault(number, {})["fna_error"] = error
        return {
            "source_sha256": self.sha256,
            "source_data_sha256": self.data_sha256,
            "replaced": self.count(Decision.REPLACED),
            "refused": self.count(Decision.REFUSED),
            "kept": self.count(Decision.KEPT),
            "prefix_tokens": self.prefix_tokens,
            "features": {str(block): tensor for block, tensor in self.features.items()},
            "blocks": [{**row.as_dict(), **errors.get(row.block, {})} for row in self.rows],
            "notes": self.notes,
        }


def _silent(text: str) -> None:
    """Say nothing."""


def inspect_file(path: Path, input_shapes: dict[str, Shape] | None = None) -> list[Row]:
    """The attention table of any ONNX file.

    Raises:
        InputFileError: if the file cannot be read or does not hold together.
    """
    try:
        graph = GraphView(import_model(prepare(load_model(path), []), path.parent))
        return scan(graph, find_points_of(graph, input_shapes or {}))
    except (*MALFORMED, RecursionError, MemoryError) as error:
        if isinstance(error, FnaError):
            raise
        raise InputFileError(
            f"{path} cannot be examined, its graph is malformed ({type(error).__name__}: {one_line(error)})"
        ) from error


def graft(
    source: Path, output: Path | None, options: GraftOptions | None = None, progress: Progress = _silent
) -> GraftResult:
    """Replace what can be replaced in `source` and write `output`; None writes nothing (a dry run).

    Raises:
        InputFileError: if the file cannot be read, written or examined.
        InvalidPlanError: if nothing was replaced, or the plan does not fit.
        CheckFailedError: with `strict`, if any attention was refused.
    """
    try:
        return _graft(source, output, options or GraftOptions(), progress)
    except (*MALFORMED, RecursionError, MemoryError) as error:
        if isinstance(error, FnaError):
            raise
        raise InputFileError(
            f"{source} cannot be grafted, its graph is malformed ({type(error).__name__}: {one_line(error)})"
        ) from error


def _graft(source: Path, output: Path | None, options: GraftOptions, progress: Progress) -> GraftResult:
    progress(f"reading {source}")
    if output is not None:
        check_output(source, output)
    notes: list[str] = []
    model = load_model(source)
    sha256 = file_sha256(source)
    data_sha256 = {
        str(path.relative_to(source.parent)): file_sha256(path) for path in external_files(model, source.parent)
    }
    graph = import_model(prepare(model, notes), source.parent)
    if not was_sorted(graph):
        notes.append("the nodes were not in topological order; they were sorted")
    del model
    result = _replace_attention(graph, options, source.name, progress, dry=output is None)
    result.sha256, result.data_sha256, result.notes = sha256, data_sha256, [*notes, *result.notes]
    if output is None:
        return result
    assert result.model is not None
    assert result.plan is not None
    describe_graft(result.model, result.rows, result.plan, result.prefix_tokens, source.name, sha256, data_sha256)
    del graph
    if source.stat().st_size > LARGE_FILE_BYTES:
        # graphs of graphsurgeon are cycles; the model that was read goes before another of its size is written
        gc.collect()
    progress(f"writing {output}")
    write_beside_its_data(result.model, source.parent, output)
    return result


def inspect_graph(graph: gs.Graph, input_shapes: dict[str, Shape] | None = None) -> list[Row]:
    """The attention table of an onnx-graphsurgeon graph; `row.attention` names the tensors of each block.

    Raises:
        InputFileError: if the graph does not hold together.
    """
    view = GraphView(import_model(export_model(graph), folder_of(graph)))
    return scan(view, find_points_of(view, input_shapes or {}))


def graft_graph(graph: gs.Graph, options: GraftOptions | None = None, progress: Progress = _silent) -> GraftResult:
    """Replace what can be replaced in an onnx-graphsurgeon graph; the new one is `result.graph`, `graph` stays as it is.

    Raises:
        InputFileError: if the graph does not hold together.
        InvalidPlanError: if nothing was replaced, or the plan does not fit.
        CheckFailedError: with `strict`, if any attention was refused.
    """
    notes: list[str] = []
    imported = import_model(prepare(export_model(graph), notes), folder_of(graph))
    result = _replace_attention(imported, options or GraftOptions(), "the graph", progress, dry=False)
    assert result.model is not None
    assert result.plan is not None
    describe_graft(result.model, result.rows, result.plan, result.prefix_tokens, graph.name, None, {})
    result.notes = [*notes, *result.notes]
    return result


def _replace_attention(
    graph: gs.Graph, options: GraftOptions, name: str, progress: Progress, *, dry: bool
) -> GraftResult:
    """Look for attention, decide, rewrite and prove; `dry` stops once it is decided."""
    if options.resolution is not None:
        from fna.export.surgery.graph.resolution import set_resolution

        set_resolution(graph, options.resolution)
        graph = import_model(export_model(graph), folder_of(graph))
    view = GraphView(graph)
    _check_opset(view)
    points = find_points_of(view, options.input_shapes)
    progress("looking for attention")
    rows = scan(view, points)
    if options.plan is not None:
        height, width = find_image_size(original_model(graph))
        options.plan.check_fits(name, None if height is None or width is None else (height, width))
    plan = _decide(rows, options)
    if dry:
        return GraftResult(rows, None, plan, None, None, {}, "", folder=view.folder)
    result = _replace_and_prove(view, points, rows, plan, options, progress)
    result.folder = view.folder
    if result.model is None:
        raise InvalidPlanError(f"{name}: nothing was replaced: {_why_nothing(rows)}")
    if options.strict and result.refused:
        first = next(row for row in rows if row.decision is Decision.REFUSED)
        raise CheckFailedError(
            f"{result.refused} attention blocks were refused (--strict): block {first.block}, {first.node}: {first.reason}"
        )
    return result


def prepare(model: ModelProto, notes: list[str]) -> ModelProto:
    """Put model-local functions of other tools in place of their calls; ours stay."""
    foreign = [(function.domain, function.name) for function in model.functions if function.domain != "fna"]
    if not foreign:
        return model
    import onnx.inliner

    notes.append(f"{len(foreign)} model-local functions were inlined")
    try:
        return onnx.inliner.inline_selected_functions(model, foreign, exclude=False)
    except Exception as error:
        raise InputFileError(f"the file's functions cannot be inlined: {one_line(error)}") from None


def find_points_of(graph: GraphView, shapes: dict[str, Shape]) -> list[ShapePoint]:
    """Input sizes that the file holds together at, those given among them.

    Raises:
        InputFileError: if there are none, or an input is named that the file does not have.
    """
    unknown = set(shapes) - {tensor.name for tensor in graph.inputs}
    if unknown:
        names = ", ".join(tensor.name for tensor in graph.inputs)
        raise InputFileError(f"the file has no input {sorted(unknown)[0]!r}; its inputs are {names}")
    try:
        return find_points(graph, shapes)
    except ShapeConflictError as error:
        raise InputFileError(
            f"the file does not hold together at any input size tried ({error}); "
            "give one that it takes, as in --input-shape pixel_values=1x3x224x224"
        ) from None


def _check_opset(graph: GraphView) -> None:
    if not LOWEST_OPSET <= graph.opset <= HIGHEST_OPSET:
        raise InputFileError(
            f"the file uses opset {graph.opset}, but FNA exists for opsets {LOWEST_OPSET} to {HIGHEST_OPSET}; "
            "convert it with onnx.version_converter first"
        )


def _decide(rows: Sequence[Row], options: GraftOptions) -> Plan:
    """Settle which eligible blocks become FNA; the others are kept, or refused where S does not fit."""
    if options.plan is not None:
        plan = options.plan
        if plan.num_blocks != len(rows):
            raise InvalidPlanError(
                f"the plan is for {plan.num_blocks} attention blocks, but the file has {len(rows)}; see fna inspect"
            )
    else:
        plan = uniform_plan(
            max(1, len(rows)),
            layers=options.layers if rows else "none",
            landmarks=options.landmarks,
            sampler=options.sampler,
            method=options.method,  # type: ignore[arg-type]
            core=options.core,
            steps=options.steps,
            low=options.low,
            prefix_tokens=options.prefix_tokens,
            seed=options.seed,
        )
    for row in rows:
        if row.decision is not Decision.ELIGIBLE:
            continue
        block = plan.find(row.block)
        if block is None:
            if plan.find_mask(row.block) is None and plan.find_focal(row.block) is None:
                row.decision, row.reason = Decision.KEPT, "not among the layers asked for"
        elif min(row.tokens) <= block.landmarks:
            row.decision = Decision.REFUSED
            row.reason = f"{min(row.tokens)} tokens are not more than {block.landmarks} landmarks"
    return plan


def _replace_and_prove(
    graph: GraphView, points: list[ShapePoint], rows: list[Row], plan: Plan, options: GraftOptions, progress: Progress
) -> GraftResult:
    """Rewrite; put back what fails the proof; rewrite again until all that is replaced is proven."""
    proof = Proof()
    rewritten: Rewritten | None = None
    for _ in range(len(rows) + 1):
        chosen = [row for row in rows if row.decision is Decision.ELIGIBLE]
        if not chosen:
            return GraftResult(rows, None, plan, proof, None, {}, "")
        progress(f"replacing {len(chosen)} blocks")
        rewritten = rewrite(graph, points, chosen, plan)
        _put_back_survivors(graph, rewritten)
        if all(row.decision is Decision.ELIGIBLE for row in chosen) and options.check:
            progress(f"checking {len(chosen)} blocks")
            proof = prove_blocks(graph, points, rewritten)
            if not proof.failed:
                prove_file(rewritten, points, graph.folder, proof)
            for row in chosen:
                if row.block in proof.failed:
                    row.decision, row.reason = Decision.REFUSED, f"put back: {proof.failed[row.block]}"
        if all(row.decision is Decision.ELIGIBLE for row in chosen):
            break
    assert rewritten is not None
    put_weights_in(rewritten.model, rewritten.weights)
    for row in rows:
        if row.decision is Decision.ELIGIBLE:
            row.decision = Decision.REPLACED
    prefixes = set(rewritten.prefix_tokens.values())
    prefix = prefixes.pop() if len(prefixes) == 1 else None
    return GraftResult(rows, rewritten.model, plan, proof, prefix, rewritten.features, "", rewritten.notes)


def _put_back_survivors(graph: GraphView, rewritten: Rewritten) -> None:
    """A block whose softmax is still needed for something else was not replaced; refuse it."""
    left = {name for node in rewritten.model.graph.node for name in node.output}
    for replacement in rewritten.replacements:
        anchor = graph.nodes[replacement.row.anchor]
        weights = anchor.outputs[0].name
        if weights in left and weights != replacement.row.attention.result.tensor:  # type: ignore[union-attr]
            replacement.row.decision = Decision.REFUSED
            replacement.row.reason = "put back: its attention weights are needed by other nodes"


def _why_nothing(rows: Sequence[Row]) -> str:
    if not rows:
        return "the file holds no attention that could be recognised"
    counts: dict[str, list[int]] = {}
    for row in rows:
        counts.setdefault(row.reason, []).append(row.block)
    reason, blocks = max(counts.items(), key=lambda counted: len(counted[1]))
    return f"{len(rows)} attention blocks found; block {blocks[0]}{' and others' if len(blocks) > 1 else ''}: {reason}"


__all__ = [
    "FnaError", "GraftOptions", "GraftResult", "find_image_size", "graft", "graft_graph", "inspect_file", "inspect_graph",
    "open_graph",
]  # fmt: skip
