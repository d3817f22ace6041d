"""`fna graft` as a function: load, scan, decide, rewrite, prove, write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

import fna
from fna.errors import CheckFailedError, FnaError, InputFileError, InvalidPlanError
from fna.export.metadata import FileMetadata, write_metadata
from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.preprocessing import Preprocessing
from fna.export.surgery.graph.index import Graph, all_tensors, attribute, external_file, load_model, one_line
from fna.export.surgery.graph.shapes import Point, Shape, ShapeConflictError, find_points
from fna.export.surgery.prove import Proof, prove_blocks, prove_file
from fna.export.surgery.recognise.rows import Decision, Row
from fna.export.surgery.recognise.scan import MALFORMED, scan
from fna.export.surgery.rewrite.rewrite import Rewritten, rewrite
from fna.files import file_sha256, written_whole
from fna.plan import Plan, uniform_plan
from fna.samplers import DEFAULT_SAMPLER

Progress = Callable[[str], None]


@dataclass(frozen=True)
class GraftOptions:
    """What to replace and how.

    Attributes:
        layers: block numbers of the table, as in `6-11`, or `all`.
        landmarks: S.
        sampler: how landmarks are chosen.
        method: `weighted` or `published`.
        plan: a whole plan; takes the place of the four above.
        prefix_tokens: class and register tokens; None detects them.
        seed: for the random sampler.
        input_shapes: sizes to examine the file at, by input name, where it leaves them open.
        resolution: change the input's height and width first.
        check: prove each block.
        strict: fail if any attention was refused.
    """

    layers: str = "all"
    landmarks: int = 64
    sampler: str = DEFAULT_SAMPLER
    method: str = "weighted"
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
        model = prepare(load_model(path), [])
        graph = Graph(model, path.parent)
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
        _check_output(source, output)
    notes: list[str] = []
    model = load_model(source)
    sha256 = file_sha256(source)
    data_sha256 = {
        str(path.relative_to(source.parent)): file_sha256(path) for path in _external_files(model, source.parent)
    }
    model = prepare(model, notes)
    if options.resolution is not None:
        from fna.export.surgery.graph.resolution import set_resolution

        model = set_resolution(model, source.parent, options.resolution)
    graph = Graph(model, source.parent)
    if not graph.was_sorted:
        notes.append("the nodes were not in topological order; they were sorted")
    _check_opset(graph)
    points = find_points_of(graph, options.input_shapes)
    progress("looking for attention")
    rows = scan(graph, points)
    if options.plan is not None:
        _check_plan_fits(options.plan, source, model)
    plan = _decide(rows, options)
    if output is None:
        return GraftResult(rows, None, plan, None, None, {}, sha256, notes, data_sha256)
    result = _replace_and_prove(graph, points, rows, plan, options, progress)
    result.sha256, result.data_sha256, result.notes = sha256, data_sha256, [*notes, *result.notes]
    if result.model is None:
        raise InvalidPlanError(f"{source}: nothing was replaced: {_why_nothing(rows)}")
    if options.strict and result.count(Decision.REFUSED):
        first = next(row for row in rows if row.decision is Decision.REFUSED)
        raise CheckFailedError(
            f"{result.count(Decision.REFUSED)} attention blocks were refused (--strict): block {first.block}, "
            f"{first.node}: {first.reason}"
        )
    _add_metadata(result, source, plan)
    progress(f"writing {output}")
    _write(result.model, source.parent, output)
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


def find_points_of(graph: Graph, shapes: dict[str, Shape]) -> list[Point]:
    """Input sizes that the file holds together at, those given among them.

    Raises:
        InputFileError: if there are none, or an input is named that the file does not have.
    """
    unknown = set(shapes) - {item.name for item in graph.inputs}
    if unknown:
        names = ", ".join(item.name for item in graph.inputs)
        raise InputFileError(f"the file has no input {sorted(unknown)[0]!r}; its inputs are {names}")
    try:
        return find_points(graph, shapes)
    except ShapeConflictError as error:
        raise InputFileError(
            f"the file does not hold together at any input size tried ({error}); "
            "give one that it takes, as in --input-shape pixel_values=1x3x224x224"
        ) from None


def _check_opset(graph: Graph) -> None:
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
            prefix_tokens=options.prefix_tokens,
            seed=options.seed,
        )
    for row in rows:
        if row.decision is not Decision.ELIGIBLE:
            continue
        block = plan.find(row.block)
        if block is None:
            if plan.find_mask(row.block) is None:
                row.decision, row.reason = Decision.KEPT, "not among the layers asked for"
        elif min(row.tokens) <= block.landmarks:
            row.decision = Decision.REFUSED
            row.reason = f"{min(row.tokens)} tokens are not more than {block.landmarks} landmarks"
    return plan


def _check_plan_fits(plan: Plan, source: Path, model: ModelProto) -> None:
    height, width = find_image_size(model)
    plan.check_fits(source.name, None if height is None or width is None else (height, width))


def _replace_and_prove(
    graph: Graph, points: list[Point], rows: list[Row], plan: Plan, options: GraftOptions, progress: Progress
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
    for row in rows:
        if row.decision is Decision.ELIGIBLE:
            row.decision = Decision.REPLACED
    prefixes = set(rewritten.prefix_tokens.values())
    prefix = prefixes.pop() if len(prefixes) == 1 else None
    return GraftResult(rows, rewritten.model, plan, proof, prefix, rewritten.features, "", rewritten.notes)


def _put_back_survivors(graph: Graph, rewritten: Rewritten) -> None:
    """A block whose softmax is still needed for something else was not replaced; refuse it."""
    left = {name for node in rewritten.model.graph.node for name in node.output}
    for item in rewritten.replacements:
        anchor = graph.nodes[item.row.anchor]
        if anchor.output[0] in left and anchor.output[0] != item.row.attention.result.tensor:  # type: ignore[union-attr]
            item.row.decision = Decision.REFUSED
            item.row.reason = "put back: its attention weights are needed by other nodes"


def _why_nothing(rows: Sequence[Row]) -> str:
    if not rows:
        return "the file holds no attention that could be recognised"
    counts: dict[str, list[int]] = {}
    for row in rows:
        counts.setdefault(row.reason, []).append(row.block)
    reason, blocks = max(counts.items(), key=lambda entry: len(entry[1]))
    return f"{len(rows)} attention blocks found; block {blocks[0]}{' and others' if len(blocks) > 1 else ''}: {reason}"


# ---------------------------------------------------------------- files


def _add_metadata(result: GraftResult, source: Path, plan: Plan) -> None:
    """Say in the file what was done: the plan, the original's SHA-256, the table."""
    model = result.model
    assert model is not None
    numbers = {row.block for row in result.rows if row.decision is Decision.REPLACED}
    kept = plan.model_copy(
        update={
            "num_blocks": len(result.rows),
            "blocks": tuple(block for block in plan.blocks if block.block in numbers),
            "prefix_tokens": plan.prefix_tokens if plan.prefix_tokens is not None else result.prefix_tokens,
        }
    )
    height, width = find_image_size(model)
    metadata = FileMetadata(
        plan=kept,
        preprocessing=_known_preprocessing(model),
        source=source.name,
        origin="graft",
        precision=_precision(model),
        height=height,
        width=width,
        patch_size=_patch_size(model),
        tools={"fna": fna.__version__, "onnx": onnx.__version__},
        original_sha256=result.sha256,
        original_data_sha256=result.data_sha256 or None,
        attention_table=[row.as_dict() for row in result.rows],
    )
    write_metadata(model, metadata)


def _image_input(model: ModelProto) -> onnx.ValueInfoProto | None:
    names = {item.name for item in model.graph.initializer}
    images = [
        item for item in model.graph.input if item.name not in names and len(item.type.tensor_type.shape.dim) == 4
    ]
    return images[0] if images else None


def find_image_size(model: ModelProto) -> tuple[int | None, int | None]:
    """Height and width of a file's image input; None where they are open, or there is no such input."""
    image = _image_input(model)
    if image is None:
        return None, None
    sizes = [dim.dim_value or None for dim in image.type.tensor_type.shape.dim[2:]]
    return sizes[0], sizes[1]


def _patch_size(model: ModelProto) -> int | None:
    """The stride of the convolution that reads the image."""
    image = _image_input(model)
    if image is None:
        return None
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[0] == image.name:
            strides = attribute(node, "strides")
            return int(strides[0]) if strides and strides[0] == strides[-1] else None
    return None


def _known_preprocessing(model: ModelProto) -> Preprocessing:
    """The preprocessing that an earlier run of this project left in the file; else the usual one."""
    for entry in model.metadata_props:
        if entry.key == "fna.preprocessing":
            try:
                return Preprocessing.model_validate_json(entry.value)
            except ValueError:
                break
    return Preprocessing()


def _precision(model: ModelProto) -> Literal["fp32", "fp16", "bf16"]:
    """The type of most weights."""
    sizes = {TensorProto.FLOAT: 0.0, TensorProto.FLOAT16: 0.0, TensorProto.BFLOAT16: 0.0}
    for tensor in model.graph.initializer:
        if tensor.data_type in sizes:
            sizes[tensor.data_type] += float(np.prod(tensor.dims, dtype=np.float64))
    most = max(sizes, key=lambda kind: sizes[kind])
    return {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}[most]  # type: ignore[return-value]


def _check_output(source: Path, output: Path) -> None:
    if output.exists() and output.is_dir():
        raise InputFileError(f"{output} is a folder; give the path of the file to write")
    if not output.parent.is_dir():
        raise InputFileError(f"the folder {output.parent} does not exist; make it first")
    if not os.access(output.parent, os.W_OK):
        raise InputFileError(f"the folder {output.parent} cannot be written to")
    if output.exists() and source.exists() and output.samefile(source):
        raise InputFileError(f"{output} is the input file; give another name for the output")


def _write(model: ModelProto, folder: Path, output: Path) -> None:
    """Write a model whole or not at all; external data that lies elsewhere is copied beside it."""
    try:
        content = model.SerializeToString()
    except Exception as error:
        raise InputFileError(f"the model cannot be written: {one_line(error)}") from None
    try:
        if folder.resolve() != output.parent.resolve():
            _copy_external_data(model, folder, output.parent)
        _write_bytes(content, output)
    except OSError as error:
        raise InputFileError(f"{output} cannot be written: {one_line(error)}") from None


def _write_bytes(content: bytes, output: Path) -> None:
    with written_whole(output) as temporary:
        temporary.write_bytes(content)


def _external_files(model: ModelProto, folder: Path) -> list[Path]:
    files = {
        external_file(tensor, folder) for tensor in all_tensors(model) if tensor.data_location == TensorProto.EXTERNAL
    }
    return sorted(files)


def _copy_external_data(model: ModelProto, folder: Path, target: Path) -> None:
    for path in _external_files(model, folder):
        destination = target / path.relative_to(folder)
        if destination.exists():
            if destination.stat().st_size == path.stat().st_size and file_sha256(destination) == file_sha256(path):
                continue
            raise InputFileError(
                f"external data file {destination} exists and is another; choose another output folder"
            )
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(f".{destination.name}.part")
        try:
            shutil.copyfile(path, partial)
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)


__all__ = ["FnaError", "GraftOptions", "GraftResult", "graft", "inspect_file"]
