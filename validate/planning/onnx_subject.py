"""Planning for an ONNX file of anyone's, through its attention blocks; no PyTorch source is needed.

The file is run with the operands of each recognised block as further outputs. There are no gradients: an error's weight is taken
from the projection that follows the block, and from real runs of one block at a time (`Planner.scales`).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from fna.errors import InputFileError, InvalidArgumentError
from fna.export.metadata import PREFIX, read_metadata
from fna.export.preprocessing import Preprocessing
from fna.export.surgery.graft import GraftOptions, find_image_size, find_points_of, graft, prepare
from fna.export.surgery.graph.files import export_model, import_model, load_model, stored_value
from fna.export.surgery.graph.resolution import set_resolution
from fna.export.surgery.graph.view import GraphView, output_names
from fna.export.surgery.output import external_files
from fna.export.surgery.recognise.rows import Decision, Row
from fna.export.surgery.recognise.scan import scan
from fna.export.surgery.recognise.stream import count_prefix_tokens, find_stream
from fna.export.surgery.rewrite.rewrite import operand_nodes
from fna.files import file_sha256, load_onnx
from fna.plan import Plan
from fna.runtime import Arrays, open_session
from fna.validate.planning.subject import BlockView, Layout
from fna.validate.task.inputs import OutputKinds

TYPICAL_COHERENCE = 30.0
"""Where gradients cannot say: by how much more an error that all tokens share weighs. Between 5 and 100 in DINOv2-S's blocks."""


class OnnxSubject:
    """An ONNX file at one input size."""

    def __init__(self, path: Path, size: tuple[int, int] | None) -> None:
        """Find the attention blocks.

        Raises:
            InputFileError: if the file cannot be read, or holds no attention that could be FNA.
            InvalidArgumentError: if its input size is open and none is given.
        """
        self.path, self.size = path, size
        model = prepare(load_model(path), [])
        if size is not None:
            imported = import_model(model, path.parent)
            set_resolution(imported, size)
            model = export_model(imported)
        graph = GraphView(import_model(model, path.parent))
        points = find_points_of(graph, {})
        rows = scan(graph, points)
        eligible = [row for row in rows if row.decision is Decision.ELIGIBLE and row.attention is not None]
        if not eligible:
            reason = rows[0].reason if rows else "it holds none that could be recognised"
            raise InputFileError(f"{path} has no attention that could be FNA: {reason}; see fna inspect")
        height, width = find_image_size(model)
        if any(len(set(row.tokens)) > 1 for row in eligible) or height is None or width is None:
            raise InvalidArgumentError(f"{path} leaves its input size open; give the --resolution to plan for")
        common = Counter((row.tokens[0], row.heads, row.head_size) for row in eligible).most_common(1)[0][0]
        tokens, heads, head_size = common
        assert heads is not None
        assert head_size is not None
        self._rows = [row for row in eligible if (row.tokens[0], row.heads, row.head_size) == common]
        kept = {row.block for row in self._rows}
        attention = self._rows[0].attention
        assert attention is not None
        stream = find_stream(graph, points, attention)
        prefix = (count_prefix_tokens(graph, points, stream) if stream is not None else None) or 0
        patches = _square_or_ratio(tokens - prefix, height, width)
        self.layout = Layout(
            model=path.name,
            num_blocks=len(rows),
            refused={row.block: row.reason or "its sizes differ" for row in rows if row.block not in kept},
            tokens=tokens,
            heads=heads,
            head_size=head_size,
            channels=heads * head_size,
            prefix_tokens=prefix,
            patches=patches,
            resolution=(height, width),
        )
        self.preprocessing = _preprocessing(model, path)
        self._outputs = [output.name for output in model.graph.output]
        self._fidelity_tensor = _last_tokens(graph, points[0].shapes, tokens)
        self._folder = tempfile.TemporaryDirectory(prefix="fna-plan-")
        self._names: dict[int, tuple[str, str, str, str | None]] = {}
        self._roots: dict[int, Tensor] = {}
        observed = self._observed(graph, points)
        self._session = self._open(observed, "observed")
        self._input = self._session.get_inputs()[0].name
        self._planned: tuple[Plan | None, Any] = (None, self._session)

    def fingerprint(self) -> str:
        """See `fna.validate.planning.subject.Subject.fingerprint`."""
        files = [self.path, *external_files(load_onnx(self.path, tensors=False), self.path.parent)]
        return " ".join(file_sha256(file) for file in files)

    def look(self, pixels: NDArray[np.float32], visit: Callable[[BlockView], None]) -> None:
        """See `fna.validate.planning.subject.Subject.look`."""
        wanted = [name for names in self._names.values() for name in names if name is not None]
        wanted = list(dict.fromkeys(wanted))
        values = dict(zip(wanted, self._session.run(wanted, {self._input: pixels[None]}), strict=True))
        with torch.inference_mode():
            for row in self._rows:
                query, key, value, hidden = (
                    None if name is None else torch.from_numpy(np.ascontiguousarray(values[name], np.float32))
                    for name in self._names[row.block]
                )
                assert query is not None
                assert key is not None
                assert value is not None
                scale = float(row.attention.scale)  # type: ignore[union-attr]
                exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
                coherence = torch.full((self.layout.heads,), TYPICAL_COHERENCE)
                root = self._roots[row.block] / (2 * self.layout.tokens) ** 0.5
                visit(BlockView(row.block, query, key, value, exact, scale, hidden, root, coherence))

    def run(self, pixels: NDArray[np.float32], plan: Plan | None) -> Arrays:
        """See `fna.validate.planning.subject.Subject.run`."""
        if plan is None or not plan.replaced_blocks:
            session = self._session
        elif self._planned[0] == plan:
            session = self._planned[1]
        else:
            output = Path(self._folder.name) / "planned.onnx"
            graft(self.path, output, GraftOptions(plan=plan, resolution=self.size, check=False))
            session = self._open(onnx.load(output), "planned")
            self._planned = (plan, session)
        names = list(dict.fromkeys([*self._outputs, self._fidelity_tensor]))
        return dict(zip(names, session.run(names, {self._input: pixels[None]}), strict=True))

    def tokens(self, outputs: Arrays) -> NDArray[np.float32]:
        """See `fna.validate.planning.subject.Subject.tokens`."""
        rows = np.asarray(outputs[self._fidelity_tensor], np.float32)
        return rows[0] if rows.ndim == 3 else rows.reshape(1, -1)

    def kinds(self, outputs: Arrays) -> OutputKinds:
        """See `fna.validate.planning.subject.Subject.kinds`: told by their shapes."""
        height, width = self.layout.resolution
        maps = tuple(
            name
            for name, array in outputs.items()
            if array.size == height * width and array.shape[-2:] == (height, width)
        )
        tokens = tuple(
            name for name, array in outputs.items() if array.ndim == 3 and array.shape[1] == self.layout.tokens
        )
        return OutputKinds(maps, tokens, self.layout.prefix_tokens)

    def _open(self, model: ModelProto, name: str) -> Any:
        known = {output.name for output in model.graph.output}
        if self._fidelity_tensor not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=self._fidelity_tensor))
        path = Path(self._folder.name) / f"{name}-run.onnx"
        onnx.save(model, path)
        return open_session(path)

    def _observed(self, graph: GraphView, points: list[Any]) -> ModelProto:
        """A copy of the model with query, key, value and hidden states of each block as outputs."""
        copy = export_model(graph.graph)
        nodes, constants, operands = operand_nodes(graph, points, self._rows)
        for row, names in zip(self._rows, operands, strict=True):
            assert row.attention is not None
            stream = find_stream(graph, points, row.attention)
            hidden = None if stream is None or stream.sequence_first else stream.tensor
            self._names[row.block] = (*names, hidden)
            self._roots[row.block] = _projection_root(graph, row)
        have = {output.name for output in copy.graph.output}
        copy.graph.node.extend(nodes)
        copy.graph.initializer.extend(constants.values())
        wanted = dict.fromkeys(name for names in self._names.values() for name in names if name is not None)
        copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in have)
        return copy


def _projection_root(graph: GraphView, row: Row) -> Tensor:  # [H, D, D]
    """A root of `W W^T` per head, with W the projection `[H D, C]` that reads the block's result; the identity if none is found."""
    attention = row.attention
    assert attention is not None
    heads, size = attention.heads, attention.head_size
    plain = torch.eye(size).expand(heads, size, size)
    for index in graph.readers(attention.result.tensor):
        node = graph.nodes[index]
        if node.op not in ("MatMul", "Gemm") or node.inputs[1].name not in graph.initializers:
            continue
        weight = stored_value(node.inputs[1]).astype(np.float32)
        turned = node.op == "Gemm" and bool(node.attrs.get("transB"))
        weight = weight.T if turned else weight
        if weight.ndim == 2 and weight.shape[0] == heads * size:
            parts = torch.from_numpy(np.ascontiguousarray(weight)).reshape(heads, size, -1)
            values, vectors = torch.linalg.eigh(parts @ parts.mT)
            return vectors * values.clamp(min=0).sqrt()[..., None, :]
    return plain


def _last_tokens(graph: GraphView, shapes: dict[str, Any], tokens: int) -> str:
    """The last tensor `[B, N, C]` of the file, the tokens nearest to its output; the first output where there is none."""
    best = None
    for node in graph.nodes:
        for name in output_names(node):
            shape: Sequence[int] | None = shapes.get(name)
            if shape is not None and len(shape) == 3 and shape[1] == tokens and name in graph.data:
                best = name
    if best is not None:
        return best
    return str(graph.graph.outputs[0].name)


def _square_or_ratio(count: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of so many square patches in an image of that size, or None where it cannot be."""
    for rows in range(1, count + 1):
        if count % rows == 0 and rows * width == (count // rows) * height:
            return rows, count // rows
    return None


def _preprocessing(model: ModelProto, path: Path) -> Preprocessing:
    if any(prop.key.startswith(PREFIX) for prop in model.metadata_props):
        return read_metadata(model, str(path)).preprocessing
    return Preprocessing()
