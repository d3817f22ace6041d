"""What a plan puts around an FNA node: heads that stay exact, and the correction; `fna.composition` in ONNX's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from fna.block_steps import BlockSteps, NystromStep, wire_block
from fna.correction import Correction
from fna.errors import InvalidPlanError
from fna.export.surgery.graph.fold import numpy_type
from fna.export.surgery.recognise.rows import Attention
from fna.samplers.common.spacing import patch_grid

FAR_END = 2**62

MakeNode = Callable[[str, str, str, str], NodeProto]


class Names(Protocol):
    """Where new names and constants come from."""

    def unique(self, name: str) -> str:
        """A name that nothing in the file has yet."""

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initializer; equal ones are shared."""


@dataclass(frozen=True)
class Site:
    """One block that becomes FNA: what it is, its steps, and its tensors `[B, H, N, D]`."""

    attention: Attention
    steps: BlockSteps
    step: NystromStep
    prefix_tokens: int
    name: str
    query: str
    key: str
    value: str
    landmarks: str


@dataclass
class OnnxWiring:
    """How `fna.block_steps.wire_block` writes a block in ONNX; a tensor is its name.

    Attributes:
        names: for new names and constants.
        site: the block.
        make_fna: makes the FNA node from the names of query, key, value and output.
        make_exact: makes a node of exact attention likewise; None writes it in standard operators.
        nodes: what was written so far, the FNA node left out.
        fna: the FNA node.
    """

    names: Names
    site: Site
    make_fna: MakeNode
    make_exact: MakeNode | None
    nodes: list[NodeProto] = field(default_factory=list)
    fna: NodeProto | None = None

    def take_heads(self, tensor: str, heads: Sequence[int], purpose: str) -> str:
        """See `fna.block_steps.BlockWiring`."""
        result = self.names.unique(f"{tensor}_{purpose}")
        index = self.names.constant(f"fna/{purpose}_heads", np.asarray(heads, np.int64))
        self.nodes.append(helper.make_node("Gather", [tensor, index], [result], name=result, axis=1))
        return result

    def join_heads(self, parts: Sequence[str], order: Sequence[int]) -> str:
        """See `fna.block_steps.BlockWiring`."""
        joined, ordered = (self.names.unique(f"{self.site.name}/{step}") for step in ("all_heads", "in_order"))
        place = self.names.constant("fna/head_order", np.asarray(order, np.int64))
        self.nodes.append(helper.make_node("Concat", parts, [joined], name=joined, axis=1))
        self.nodes.append(helper.make_node("Gather", [joined, place], [ordered], name=ordered, axis=1))
        return ordered

    def nystrom(self, query: str, key: str, value: str) -> str:
        """See `fna.block_steps.BlockWiring`."""
        result = self.names.unique(f"{self.site.name}/fna")
        self.fna = self.make_fna(query, key, value, result)
        return result

    def correct(self, out: str, value: str, correction: Correction) -> str:
        """See `fna.block_steps.BlockWiring`."""
        return _correction_nodes(self.names, self.site, correction, out, value, self.nodes)

    def exact(self, query: str, key: str, value: str) -> str:
        """See `fna.block_steps.BlockWiring`."""
        if self.make_exact is None:
            return _exact_attention(self.names, self.site, (query, key, value), self.nodes)
        result = self.names.unique(f"{self.site.name}/exact_heads")
        self.nodes.append(self.make_exact(query, key, value, result))
        return result


def compose(
    names: Names, site: Site, output: str, make_fna: MakeNode, make_exact: MakeNode | None = None
) -> tuple[NodeProto, list[NodeProto]]:
    """Return the FNA node and all nodes around it that together write `output` `[B, H, N, D]`; see `OnnxWiring`.

    Raises:
        InvalidPlanError: if the plan names a head that the block does not have, or where the patches lie is not known.
    """
    wiring = OnnxWiring(names, site, make_fna, make_exact)
    result = wire_block(site.steps, site.attention.heads, site.query, site.key, site.value, wiring)
    assert wiring.fna is not None
    last = next(node for node in (wiring.fna, *wiring.nodes) if result in node.output)
    last.output[:] = [output]
    return wiring.fna, wiring.nodes


def _exact_attention(names: Names, site: Site, operands: Sequence[str], nodes: list[NodeProto]) -> str:
    stem = f"{site.name}/exact"
    new = {step: names.unique(f"{stem}_{step}") for step in ("columns", "scaled", "scores", "weights", "out")}
    scale = names.constant("fna/scale", np.asarray(site.attention.scale, numpy_type(site.attention.element_type)))
    query, key, value = operands
    nodes += [
        helper.make_node("Mul", [query, scale], [new["scaled"]], name=new["scaled"]),
        helper.make_node("Transpose", [key], [new["columns"]], name=new["columns"], perm=(0, 1, 3, 2)),
        helper.make_node("MatMul", [new["scaled"], new["columns"]], [new["scores"]], name=new["scores"]),
        helper.make_node("Softmax", [new["scores"]], [new["weights"]], name=new["weights"], axis=-1),
        helper.make_node("MatMul", [new["weights"], value], [new["out"]], name=new["out"]),
    ]
    return new["out"]


def _correction_nodes(
    names: Names, site: Site, correction: Correction, plain: str, value: str, nodes: list[NodeProto]
) -> str:
    tokens = _only_size(site)
    rows, columns = patch_grid(tokens, site.prefix_tokens, site.step.landmarks.patches)
    heads, size = len(correction.gains), site.attention.head_size
    dtype = numpy_type(site.attention.element_type)
    steps = (
        "values", "turned", "image", "local_image", "local_turned", "local", "patches", "scaled", "sum", "prefix", "joined", "kept"
    )  # fmt: skip
    new = {step: names.unique(f"{site.name}/correction_{step}") for step in steps}

    def add(op_type: str, inputs: Sequence[str], result: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(op_type, list(inputs), [result], name=f"{result}/{op_type}", **attributes))

    def ints(values: Sequence[int]) -> str:
        return names.constant("fna/" + "_".join(str(v) for v in values), np.asarray(values, np.int64))

    first, end, axis = ints([site.prefix_tokens]), ints([FAR_END]), ints([2])
    taps = np.asarray(correction.kernels, np.float32).reshape(heads, 1, correction.size, correction.size)
    kernel = names.constant(f"{site.name}/correction_kernel", np.repeat(taps, size, axis=0).astype(dtype))
    gains = np.asarray(correction.gains, np.float32).reshape(1, heads, 1, 1).astype(dtype)
    gain = names.constant(f"{site.name}/correction_gain", gains)
    add("Slice", [value, first, end, axis], new["values"])
    add("Transpose", [new["values"]], new["turned"], perm=(0, 1, 3, 2))
    add("Reshape", [new["turned"], ints([0, heads * size, rows, columns])], new["image"])
    half = correction.size // 2
    add("Conv", [new["image"], kernel], new["local_image"], group=heads * size, pads=[half] * 4)
    add("Reshape", [new["local_image"], ints([0, heads, size, rows * columns])], new["local_turned"])
    add("Transpose", [new["local_turned"]], new["local"], perm=(0, 1, 3, 2))
    add("Slice", [plain, first, end, axis], new["patches"])
    add("Mul", [new["patches"], gain], new["scaled"])
    add("Add", [new["scaled"], new["local"]], new["sum"])
    corrected = new["sum"]
    if site.prefix_tokens:
        add("Slice", [plain, ints([0]), first, axis], new["prefix"])
        add("Concat", [new["prefix"], corrected], new["joined"], axis=2)
        corrected = new["joined"]
    if not site.step.exact_rows:
        return corrected
    add("Where", [_known_rows(names, site, tokens, nodes), plain, corrected], new["kept"])
    return new["kept"]


def _known_rows(names: Names, site: Site, tokens: int, nodes: list[NodeProto]) -> str:
    """A condition `[B or 1, 1, N, 1]` that holds for landmarks."""
    steps = ("dims", "batch", "shape", "zeros", "ones", "marks", "mask", "known")
    new = {step: names.unique(f"{site.name}/landmark_{step}") for step in steps}
    zero, one = (names.constant(f"fna/{value}", np.asarray([[value]], np.float32)) for value in (0.0, 1.0))
    half = names.constant("fna/half", np.asarray(0.5, np.float32))
    first, count, axes = (
        names.constant(f"fna/{label}", np.asarray(value, np.int64))
        for label, value in (("first", [0]), (f"tokens_{tokens}", [tokens]), ("axes_1_3", [1, 3]))
    )
    nodes += [
        helper.make_node("Shape", [site.landmarks], [new["dims"]], name=new["dims"]),
        helper.make_node("Gather", [new["dims"], first], [new["batch"]], name=new["batch"], axis=0),
        helper.make_node("Concat", [new["batch"], count], [new["shape"]], name=new["shape"], axis=0),
        helper.make_node("Expand", [zero, new["shape"]], [new["zeros"]], name=new["zeros"]),
        helper.make_node("Expand", [one, new["dims"]], [new["ones"]], name=new["ones"]),
        helper.make_node(
            "ScatterElements", [new["zeros"], site.landmarks, new["ones"]], [new["marks"]], name=new["marks"], axis=1
        ),
        helper.make_node("Greater", [new["marks"], half], [new["mask"]], name=new["mask"]),
        helper.make_node("Unsqueeze", [new["mask"], axes], [new["known"]], name=new["known"]),
    ]
    return new["known"]


def _only_size(site: Site) -> int:
    sizes = set(site.attention.tokens)
    if len(sizes) != 1:
        raise InvalidPlanError(
            "a correction needs a fixed number of tokens; this file leaves its input size open (set it by --resolution)"
        )
    return int(sizes.pop())
