"""`fna graft` as a function: load, scan, decide, rewrite, prove, write."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from fna.export.functions import HIGHEST_OPSET, LOWEST_OPSET
from onnx import ModelProto, TensorProto

import fna
from fna.errors import CheckFailedError, FnaError, InputFileError, InvalidPlanError
from fna.export.surgery.graph import Graph, all_tensors, external_file, load_model, one_line
from fna.export.surgery.prove import Proof, prove_blocks, prove_file
from fna.export.surgery.rewrite import Rewritten, rewrite
from fna.export.surgery.rows import Decision, Row
from fna.export.surgery.scan import scan
from fna.export.surgery.shapes import Point, Shape, ShapeConflictError, find_points
from fna.plan import Plan, Sampler, uniform_plan

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
    sampler: Sampler = "grid"
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

    def count(self, decision: Decision) -> int:
        """How many blocks were replaced, kept or refused."""
        return sum(row.decision is decision for row in self.rows)

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
            "replaced": self.count(Decision.REPLACED),
            "refused": self.count(Decision.REFUSED),
            "kept": self.count(Decision.KEPT),
            "prefix_tokens": self.prefix_tokens,
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
    model = _prepared(load_model(path), [])
    graph = Graph(model, path.parent)
    return scan(graph, _points(graph, input_shapes or {}))


def graft(
    source: Path, output: Path | None, options: GraftOptions | None = None, progress: Progress = _silent
) -> GraftResult:
    """Replace what can be replaced in `source` and write `output`; None writes nothing (a dry run).

    Raises:
        InputFileError: if the file cannot be read, written or examined.
        InvalidPlanError: if nothing was replaced, or the plan does not fit.
        CheckFailedError: with `strict`, if any attention was refused.
    """
    options = options or GraftOptions()
    progress(f"reading {source}")
    if output is not None:
        _check_output(source, output)
    notes: list[str] = []
    model = load_model(source)
    sha256 = file_sha256(source)
    model = _prepared(model, notes)
    if options.resolution is not None:
        from fna.export.surgery.resolution import set_resolution

        model = set_resolution(model, source.parent, options.resolution)
    graph = Graph(model, source.parent)
    if not graph.was_sorted:
        notes.append("the nodes were not in topological order; they were sorted")
    _check_opset(graph)
    points = _points(graph, options.input_shapes)
    progress("looking for attention")
    rows = scan(graph, points)
    plan = _decide(rows, options)
    if output is None:
        return GraftResult(rows, None, plan, None, None, {}, sha256, notes)
    result = _replace_and_prove(graph, points, rows, plan, options, progress)
    result.sha256, result.notes = sha256, notes
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


def _prepared(model: ModelProto, notes: list[str]) -> ModelProto:
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


def _points(graph: Graph, shapes: dict[str, Shape]) -> list[Point]:
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
            row.decision, row.reason = Decision.KEPT, "not among the layers asked for"
        elif min(row.tokens) <= block.landmarks:
            row.decision = Decision.REFUSED
            row.reason = f"{min(row.tokens)} tokens are not more than {block.landmarks} landmarks"
    return plan


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
    return GraftResult(rows, rewritten.model, plan, proof, prefix, rewritten.features, "")


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


def _add_metadata(result: GraftResult, source: Path, plan: Plan) -> None:
    import numpy as np

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
    entries = {
        "fna.plan": kept.dump_json(),
        "fna.source": json.dumps({"kind": "graft", "file": source.name, "sha256": result.sha256}),
        "fna.graft": json.dumps(result.as_dict()),
        "fna.versions": json.dumps({"fna": fna.__version__, "onnx": onnx.__version__, "numpy": np.__version__}),
    }
    others = [item for item in model.metadata_props if item.key not in entries]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    model.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in entries.items())


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
    handle, name = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(output)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _copy_external_data(model: ModelProto, folder: Path, target: Path) -> None:
    files = {
        external_file(tensor, folder) for tensor in all_tensors(model) if tensor.data_location == TensorProto.EXTERNAL
    }
    for path in sorted(files):
        destination = target / path.relative_to(folder)
        if destination.exists():
            if destination.stat().st_size == path.stat().st_size and file_sha256(destination) == file_sha256(path):
                continue
            raise InputFileError(f"external data file {destination} exists and is another; choose another output folder")
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.with_name(f".{destination.name}.part")
        try:
            shutil.copyfile(path, partial)
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)


__all__ = ["FnaError", "GraftOptions", "GraftResult", "graft", "inspect_file"]
