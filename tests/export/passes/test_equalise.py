"""Equalising before quantising: nothing that the file computes changes, whatever makes the layers' inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from tiny_files import SIDE

from fna.export.passes.equalise import Equalisation, Freedom, equalise, find_freedom
from fna.export.passes.linear import LinearGraph, LinearLayer, find_linear_layers
from fna.files import load_onnx
from fna.runtime import Arrays, open_session, run_session

RANDOM = np.random.default_rng(0)
K = 8
SHAPES = {"flat": [10, K], "whole": [2, 5, K], "split": [2, 5, 4, 2]}


def equalise_all(graph: LinearGraph, layers: list[LinearLayer]) -> None:
    """By random shifts and scales, where that is allowed."""
    for source in dict.fromkeys(layer.source for layer in layers):
        sharing = [layer for layer in layers if layer.source == source]
        freedom, size = find_freedom(graph, source, sharing), len(graph.weight(sharing[0]))
        if freedom is not Freedom.NONE:
            shift = RANDOM.normal(size=size) if freedom is Freedom.ALL else np.zeros(size)
            equalise(graph, source, sharing, Equalisation(shift, np.exp(RANDOM.normal(size=size))))
    graph.finish()


def run(model: ModelProto, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
    return run_session(open_session(model), inputs)


def kinds(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", ["traced", "grafted"])
def test_equalising_alone_leaves_the_outputs_as_they_were(tiny_file: Callable[[str], Path], name: str) -> None:
    model = load_onnx(tiny_file(name))
    pixels = {model.graph.input[0].name: RANDOM.normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)}
    wanted, before = run(model, pixels), kinds(model)
    graph = LinearGraph(model)
    equalise_all(graph, find_linear_layers(graph, model, 4))
    onnx.checker.check_model(model, full_check=True)
    for output, found in run(model, pixels).items():
        assert np.linalg.norm(found - wanted[output]) < 1e-5 * np.linalg.norm(wanted[output])
    assert kinds(model) - before == {"Sub": 4}  # behind each GELU; norms and what follows take the rest


def test_what_comes_out_of_attention_is_scaled_in_the_values_weight_and_never_shifted(
    tiny_file: Callable[[str], Path],
) -> None:
    for name in ("traced", "grafted"):
        model = load_onnx(tiny_file(name))
        graph = LinearGraph(model)
        layers = find_linear_layers(graph, model, 4)
        found = {layer.name: find_freedom(graph, layer.source, [layer]) for layer in layers}
        projections = [layer for layer in layers if found[layer.name] is Freedom.SCALE]
        assert [layer.block for layer in projections] == [0, 1, 2, 3]  # exact attention, then FNA
        assert set(found.values()) == {Freedom.SCALE, Freedom.ALL}


def small_model(nodes: list[NodeProto], output: str, opset: int = 20) -> ModelProto:
    """A graph over `x [2, 5, K]`; names that begin with w are weights `[K, K]`, with b per channel, with c numbers."""
    made = {name for node in nodes for name in node.output}
    names = sorted({name for node in nodes for name in node.input} - made - {"x", *SHAPES})
    shapes = {"w": (K, K), "b": (K,), "c": ()}
    tensors = [
        numpy_helper.from_array(np.asarray(RANDOM.normal(size=shapes[name[0]]), np.float32), name) for name in names
    ]
    tensors += [numpy_helper.from_array(np.array(shape), name) for name, shape in SHAPES.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 5, K]) for name in ("x", output)]
    graph = helper.make_graph(nodes, "small", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def node(text: str, **attributes: float) -> NodeProto:
    """`y = MatMul(x, w)`."""
    output, _, call = text.partition(" = ")
    op_type, _, inputs = call.rstrip(")").partition("(")
    return helper.make_node(op_type, inputs.split(", "), [output], **attributes)


def attention(values: str) -> list[NodeProto]:
    """Tokens with themselves, in heads of two channels; `values` makes `v`."""
    return [
        node(values), node("s = Reshape(v, split)"), node("p = Transpose(s)", perm=[0, 2, 1, 3]),
        node("q = Reshape(x, split)"), node("k = Transpose(q)", perm=[0, 2, 3, 1]), node("l = Transpose(q)", perm=[0, 2, 1, 3]),
        node("m = MatMul(l, k)"), node("n = Softmax(m)"), node("o = MatMul(n, p)"), node("r = Transpose(o)", perm=[0, 2, 1, 3]),
        node("a = Reshape(r, whole)"), node(FFN),
    ]  # fmt: skip


FFN = "y = MatMul(a, w)"
CASES = {
    "one operator for GELU": ([node("a = Gelu(x)"), node(FFN)], {"Mul": 1, "Sub": 1, "Add": 1}),
    "GELU by its factor": (
        [node("e = Erf(x)"), node("h = Mul(x, c1)"), node("f = Add(e, c2)"), node("a = Mul(h, f)"), node(FFN)],
        {"Sub": 1, "Add": 1},
    ),
    "QuickGELU": (
        [node("t = Mul(x, c1)"), node("s = Sigmoid(t)"), node("a = Mul(x, s)"), node(FFN)],
        {"Mul": 1, "Sub": 1, "Add": 1},
    ),
    "SwiGLU, divided in the weight of its second factor": (
        [
            node("g = MatMul(x, w1)"), node("s = Sigmoid(g)"), node("h = Mul(g, s)"), node("u = MatMul(x, w2)"),
            node("v = Add(u, b)"), node("a = Mul(h, v)"), node(FFN),
        ],
        {"Sub": 1, "Add": 1},
    ),
    "a norm without bias": (
        [node("a = LayerNormalization(x, b)", axis=-1), node(FFN), node("z = Add(y, b2)")],
        {},
    ),
    "an RMS norm": (
        [node("q = Mul(x, x)"), node("m = Sqrt(q)"), node("n = Div(x, m)"), node("a = Mul(n, b)"), node(FFN)],
        {"Sub": 1, "Add": 1},
    ),
    "norm after the sum, which the residual reads too": (
        [node("a = LayerNormalization(x, b, b1)", axis=-1), node(FFN), node("z = Add(y, a)")],
        {"Mul": 1, "Sub": 1, "Add": 1},
    ),
    "Gemm with a transposed weight": (
        [
            node("r = LayerNormalization(x, b, b1)", axis=-1), node("a = Reshape(r, flat)"), node("g = Gemm(a, w, b2)", transB=1),
            node("y = Reshape(g, whole)"),
        ],
        {"Mul": 1, "Sub": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_computes_the_same(case: str) -> None:
    nodes, added = CASES[case]
    nodes = [NodeProto.FromString(each.SerializeToString()) for each in nodes]
    model = small_model(nodes, nodes[-1].output[0])
    pixels = {"x": RANDOM.normal(size=(2, 5, K)).astype(np.float32)}
    (wanted,), before = run(model, pixels).values(), kinds(model)
    graph = LinearGraph(model)
    equalise_all(graph, [LinearLayer(each, "a", None) for each in graph.nodes if each.input[:2] == ["a", "w"]])
    assert kinds(model) - before == added
    (found,) = run(model, pixels).values()
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_values_that_something_else_reads_are_left_alone() -> None:
    for nodes, freedom in (
        (attention("v = MatMul(x, w1)"), Freedom.SCALE),
        ([*attention("v = MatMul(x, w1)"), node("z = Add(y, v)")], Freedom.NONE),  # the residual
        (attention("v = Relu(x)"), Freedom.NONE),
    ):
        model = small_model(nodes, nodes[-1].output[0])
        graph = LinearGraph(model)
        (layer,) = [LinearLayer(each, "a", None) for each in graph.nodes if each.input[:2] == ["a", "w"]]
        assert find_freedom(graph, "a", [layer]) is freedom


def test_a_constant_that_others_read_stays_for_them() -> None:
    nodes = [
        node("n = LayerNormalization(x, b, b1)", axis=-1), node("y = MatMul(n, w)"), node("o = Mul(y, b1)"),
    ]  # fmt: skip
    model = small_model(nodes, "o")
    pixels = {"x": RANDOM.normal(size=(2, 5, K)).astype(np.float32)}
    (wanted,) = run(model, pixels).values()
    graph = LinearGraph(model)
    equalise_all(graph, [LinearLayer(graph.nodes[1], "n", None)])
    (found,) = run(model, pixels).values()
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
