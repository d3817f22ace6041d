"""Attention written node by node: each graph differs from plain attention in one thing, and the answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from surgery_helpers import Export
from torch import Tensor, nn

from fna.errors import FnaError
from fna.export.surgery.graft import GraftOptions, graft, inspect_file
from fna.export.surgery.recognise.rows import Decision

B, N, H, D = 2, 16, 4, 8
C = H * D
Nodes = list[NodeProto]


def node(op_type: str, inputs: str, output: str, **attributes: object) -> NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], **attributes)


def build(
    between: Nodes,
    constants: dict[str, np.ndarray],
    *,
    weights: str,
    value: str,
    outputs: tuple[str, ...],
    inputs: tuple[str, ...],
) -> onnx.ModelProto:
    """Projections and the product `a` of queries and keys; `between` makes the weights from it; then the product with `value`."""
    dice = np.random.default_rng(0)
    known = {name: (dice.standard_normal((C, C)) * 0.2).astype(np.float32) for name in ("wq", "wk", "wv")}
    known |= {name: (dice.standard_normal(C) * 0.2).astype(np.float32) for name in ("bq", "bv")}
    known |= {"split": np.array([0, 0, H, D]), "join": np.array([0, 0, C]), "s": np.float32(D**-0.5)}
    known |= {"m9": np.float32(-1e9), "one": np.float32(1), "half": np.float32(0.5), "last": np.array([-1])}
    nodes = [
        node("MatMul", "x wq", "q0"), node("Add", "q0 bq", "q1"), node("Reshape", "q1 split", "q2"),
        node("Transpose", "q2", "q", perm=[0, 2, 1, 3]),
        node("MatMul", "x wk", "k0"), node("Reshape", "k0 split", "k2"), node("Transpose", "k2", "k", perm=[0, 2, 3, 1]),
        node("MatMul", "x wv", "v0"), node("Add", "v0 bv", "v1"), node("Reshape", "v1 split", "v2"),
        node("Transpose", "v2", "v", perm=[0, 2, 1, 3]),
        node("MatMul", "q k", "a"), *between,
        node("MatMul", f"{weights} {value}", "o"), node("Transpose", "o", "o1", perm=[0, 2, 1, 3]), node("Reshape", "o1 join", "y"),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "hand_built",
        [helper.make_tensor_value_info("x", 1, ["b", N, C])]
        + [helper.make_tensor_value_info(name, 1, [1, 1, N, N]) for name in inputs],
        [helper.make_tensor_value_info(name, 1, None) for name in ("y", *outputs)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (known | constants).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


SCALED = node("Mul", "a s", "b")
PLAIN = [SCALED, node("Softmax", "b", "p", axis=-1)]
PLANE = (1, 1, N, N)
ROWS = np.linspace(0, 1, N, dtype=np.float32)
CAUSAL = np.triu(np.full((N, N), -np.inf, np.float32), 1)[None, None]


def added(constants: np.ndarray) -> tuple[Nodes, dict[str, np.ndarray]]:
    return [SCALED, node("Add", "b mask", "c"), node("Softmax", "c", "p")], {"mask": constants}


REPLACED: dict[str, tuple[Nodes, dict[str, np.ndarray], dict[str, object]]] = {
    "plain": (PLAIN, {}, {}),
    "a scale of full rank": ([node("Mul", "a t", "b"), node("Softmax", "b", "p")], {"t": np.full((1, 1, 1, 1), 0.3, np.float32)}, {}),
    "a negative scale": ([node("Neg", "a", "a1"), node("Mul", "a1 s", "b"), node("Softmax", "b", "p")], {}, {}),
    "a mask of zeros": (*added(np.zeros(PLANE, np.float32)), {}),
    "a mask that is the same everywhere": (*added(np.full(PLANE, 5, np.float32)), {}),
    "a condition that is never true": (
        [SCALED, node("Where", "never m9 b", "c"), node("Softmax", "c", "p")], {"never": np.zeros(PLANE, bool)}, {},
    ),
    "a limit that no score reaches": ([SCALED, node("Max", "b low", "c"), node("Softmax", "c", "p")], {"low": np.float32(-3e38)}, {}),
    "exp of log-softmax": ([SCALED, node("LogSoftmax", "b", "l"), node("Exp", "l", "p")], {}, {}),
    "exp of x less logsumexp": (
        [SCALED, node("ReduceLogSumExp", "b", "t", axes=[-1], keepdims=1), node("Sub", "b t", "l"), node("Exp", "l", "p")], {}, {},
    ),
    "dropout that is off": (
        [*PLAIN, node("Dropout", "p half off", "p2")], {"off": np.array(False)}, {"weights": "p2"},
    ),
    "weights times one": ([*PLAIN, node("Mul", "p one", "p2")], {}, {"weights": "p2"}),
    "values of other channels": (
        [*PLAIN, node("Gather", "v ix", "w", axis=3)], {"ix": np.array([1, 0, 2, 3, 7, 6, 5, 4])}, {"value": "w"},
    ),
}  # fmt: skip

REFUSED: dict[str, tuple[Nodes, dict[str, np.ndarray], dict[str, object], str]] = {
    "a scale per column": ([node("Mul", "a t", "b"), node("Softmax", "b", "p")], {"t": ROWS}, {}, "not one scalar"),
    "a scale divided by the scores": ([node("Div", "s a", "b"), node("Softmax", "b", "p")], {}, {}, "scale"),
    "a mask less the scores": (
        [SCALED, node("Sub", "m b", "c"), node("Softmax", "c", "p")], {"m": np.zeros(PLANE, np.float32)}, {}, "mask",
    ),
    "a causal mask": (*added(CAUSAL), {}, "causal"),
    "a bias per row": (*added(ROWS.reshape(N, 1)), {}, "position bias"),
    "a mask that is an input": (
        [SCALED, node("Add", "b m", "c"), node("Softmax", "c", "p")], {}, {"inputs": ("m",)}, "depends on data",
    ),
    "limits on the scores": (
        [SCALED, node("Clip", "b low one", "c"), node("Softmax", "c", "p")], {"low": np.float32(-1)}, {}, "altered by Clip",
    ),
    "scores rounded to integers": (
        [node("Cast", "a", "i", to=TensorProto.INT32), node("Cast", "i", "f", to=TensorProto.FLOAT), node("Softmax", "f", "p")],
        {}, {}, "altered by Cast",
    ),
    "one added to the sum": (
        [SCALED, node("Exp", "b", "e"), node("ReduceSum", "e last", "t"), node("Add", "t one", "t1"), node("Div", "e t1", "p")],
        {}, {}, "added to the sum",
    ),
    "a sink beside the scores": (
        [SCALED, node("Concat", "b z", "c", axis=-1), node("Softmax", "c", "d"), node("Slice", "d first end last", "p")],
        {"z": np.zeros((B, H, N, 1), np.float32), "first": np.array([0]), "end": np.array([N])}, {}, "joined with others",
    ),
    "weights that are an output": (PLAIN, {}, {"outputs": ("p",)}, "output of the graph"),
    "scores that are an output": (PLAIN, {}, {"outputs": ("b",)}, "output of the graph"),
    "weights that are read": ([*PLAIN, node("ReduceMean", "p", "mean", axes=[1])], {}, {"outputs": ("mean",)}, "read by more"),
    "scores that are read": ([*PLAIN, node("ReduceMean", "a", "mean", axes=[1])], {}, {"outputs": ("mean",)}, "scores are read"),
    "weights that are scaled": ([*PLAIN, node("Mul", "p s", "p2")], {}, {"weights": "p2"}, "altered by Mul"),
    "dropout in training": ([*PLAIN, node("Dropout", "p half on", "p2")], {"on": np.array(True)}, {"weights": "p2"}, "training"),
    "values of other tokens": (
        [*PLAIN, node("Gather", "v ix", "w", axis=2)], {"ix": np.roll(np.arange(N), 1)}, {"value": "w"}, "same order",
    ),
    "the softmax of a softmax": ([SCALED, node("Softmax", "b", "c"), node("Softmax", "c", "p")], {}, {}, "Softmax"),
}  # fmt: skip


def save(path: Path, between: Nodes, constants: dict[str, np.ndarray], changes: dict[str, object]) -> Path:
    settings = {"weights": "p", "value": "v", "outputs": (), "inputs": (), **changes}
    onnx.save(build(between, constants, **settings), path)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("name", REPLACED)
def test_what_has_no_effect_is_seen_through(name: str, tmp_path: Path):
    between, constants, changes = REPLACED[name]
    result = graft(
        save(tmp_path / "in.onnx", between, constants, changes), tmp_path / "out.onnx", GraftOptions(landmarks=3)
    )
    assert result.replaced == 1
    assert result.refused == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_an_effect_is_a_reason(name: str, tmp_path: Path):
    between, constants, changes, reason = REFUSED[name]
    source = save(tmp_path / "in.onnx", between, constants, changes)
    assert reason in inspect_file(source)[0].reason
    with pytest.raises(FnaError, match="nothing was replaced"):
        graft(source, tmp_path / "out.onnx", GraftOptions(landmarks=3))


def test_a_cast_of_the_scores_to_fp16_fails_the_proof_in_an_fp32_file(tmp_path: Path):
    casts = [node("Cast", "a", "h", to=TensorProto.FLOAT16), node("Cast", "h", "f", to=TensorProto.FLOAT)]
    source = save(tmp_path / "in.onnx", [*casts, node("Mul", "f s", "b"), node("Softmax", "b", "p")], {}, {})
    with pytest.raises(FnaError, match="put back"):
        graft(source, tmp_path / "out.onnx", GraftOptions(landmarks=3))


# ---------------------------------------------------------------- modules with inputs of other kinds


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, x, x, need_weights=False)[0]


class Crosses(Attends):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.attn(x, y, y, need_weights=False)[0]


class Pads(Attends):
    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return x + self.attn(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class Siamese(Attends):
    """Two images as one batch, self-attention, then each attends to the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, other = super().forward(torch.cat([x, y])).chunk(2)
        return one + self.attn(one, other, other, need_weights=False)[0]


class Mistaken(nn.Module):
    """A batch-first tensor given to a sequence-first layer: images attend to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(C, H, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(N, H, D).transpose(0, 1) for layer in (self.q, self.k, self.v))
        return ((q @ k.transpose(1, 2) * D**-0.5).softmax(-1) @ v).transpose(0, 1).reshape(N, C)


TOKENS_IN = torch.zeros(B, N, C)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], list[str]]] = {
    "self": (Attends, (TOKENS_IN,), [""]),
    "unbatched": (Unbatched, (TOKENS_IN[0],), [""]),
    "cross": (Crosses, (TOKENS_IN, TOKENS_IN), ["different inputs"]),
    "padding": (Pads, (TOKENS_IN, torch.zeros(B, N, dtype=torch.bool)), ["depends on data"]),
    "siamese": (Siamese, (TOKENS_IN[:1], TOKENS_IN[:1]), ["groups", "same tokens"]),
    "mistaken": (Mistaken, (TOKENS_IN,), ["groups"]),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_with_other_inputs(name: str, export: Export, tmp_path: Path):
    make, inputs, reasons = MODULES[name]
    source = export(
        f"module_{name}", make, batch="dynamic" if name in ("self", "mistaken") else "static", inputs=inputs
    )
    rows = inspect_file(source)
    assert [row.decision is Decision.ELIGIBLE for row in rows] == [reason == "" for reason in reasons]
    assert all(reason in row.reason for reason, row in zip(reasons, rows, strict=True))


@pytest.mark.parametrize(
    ("comparison", "limit", "replaced"), [("GreaterOrEqual", 0, True), ("Less", 5000, False), ("Greater", -1, True)]
)
def test_masks_are_proven_for_every_size_not_for_those_tried(
    comparison: str, limit: int, replaced: bool, tmp_path: Path
):
    """`positions < 5000` masks nothing at any size that is tried, and something beyond."""
    mask: Nodes = [
        node("Shape", "x", "dims"),
        node("Gather", "dims second", "count", axis=0),
        node("Range", "zero count step", "positions"),
        node(comparison, "positions limit", "keep"),
        node("Where", "keep nothing m9", "mask"),
        SCALED,
        node("Add", "b mask", "c"),
        node("Softmax", "c", "p"),
    ]
    constants = {
        "second": np.array(1), "zero": np.array(0), "step": np.array(1), "limit": np.array(limit), "nothing": np.float32(0),
    }  # fmt: skip
    model = build(mask, constants, weights="p", value="v", outputs=(), inputs=())
    for dim in model.graph.input[0].type.tensor_type.shape.dim[1:2]:
        dim.Clear()
        dim.dim_param = "tokens"
    onnx.save(model, tmp_path / "in.onnx")
    (row,) = inspect_file(tmp_path / "in.onnx")
    assert len(set(row.tokens)) > 1 or not replaced
    assert (row.decision is Decision.ELIGIBLE) == replaced, row.reason


def test_windows_are_not_mistaken_for_the_batch_of_another_input(export: Export):
    """Four windows of one image, beside an input of batch four."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(C, H, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            windows = x.view(4, N // 4, C)
            return self.attn(windows, windows, windows, need_weights=False)[0].reshape(1, N, C), y * 2

    source = export("windows_beside", Beside, batch="static", inputs=(TOKENS_IN[:1], torch.zeros(4, C)))
    (row,) = inspect_file(source)
    assert row.decision is Decision.REFUSED
    assert "windowed" in row.reason
