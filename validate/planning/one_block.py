"""One block's attention as an ONNX file with next to nothing around it: exact in each form that onnxruntime has, or by a plan."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fna.export import passes
from fna.export.surgery.graft import GraftOptions, graft
from fna.files import load_onnx, save_model
from fna.plan import Plan
from fna.validate.planning.subject import Layout

EXACT_FORMS = tuple(passes.EXACT_FORMS.values())
"""The first is what traced and grafted files hold."""

_ATTENTION_OPSET = 23


def exact_block(layout: Layout, form: str = EXACT_FORMS[0]) -> ModelProto:
    """One block's exact attention `[1, N, C] -> [1, N, C]`, with next to nothing around it, in one of `EXACT_FORMS`."""
    tokens, heads, size = layout.tokens, layout.heads, layout.head_size
    scale = size**-0.5
    nodes: list[NodeProto] = []
    constants = [
        numpy_helper.from_array(np.asarray([1, tokens, heads, size]), "split"),
        numpy_helper.from_array(np.asarray([1, tokens, heads * size]), "joined"),
        numpy_helper.from_array(np.float32(scale), "scale"),
    ]
    for number, name in enumerate(("query", "key", "value")):
        factors = np.random.default_rng(number).standard_normal(heads * size).astype(np.float32)
        constants.append(numpy_helper.from_array(factors, f"{name}_factors"))
        nodes.append(helper.make_node("Mul", ["hidden", f"{name}_factors"], [name]))
    domains = [helper.make_opsetid("", 18)]
    if form == EXACT_FORMS[2]:
        domains.append(helper.make_opsetid("com.microsoft", 1))
        operands, settings = ["query", "key", "value"], {"num_heads": heads, "scale": scale}
        nodes.append(helper.make_node("MultiHeadAttention", operands, ["attended"], domain="com.microsoft", **settings))
    else:
        columns = form == EXACT_FORMS[0]
        for name in ("query", "key", "value"):
            order = (0, 2, 3, 1) if columns and name == "key" else (0, 2, 1, 3)
            nodes.append(helper.make_node("Reshape", [name, "split"], [f"{name}_split"]))
            nodes.append(helper.make_node("Transpose", [f"{name}_split"], [f"{name}_heads"], perm=order))
        if columns:
            nodes += [
                helper.make_node("Mul", ["query_heads", "scale"], ["scaled"]),
                helper.make_node("MatMul", ["scaled", "key_heads"], ["scores"]),
                helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
                helper.make_node("MatMul", ["weights", "value_heads"], ["out_heads"]),
            ]
        else:
            domains = [helper.make_opsetid("", _ATTENTION_OPSET)]
            operands = ["query_heads", "key_heads", "value_heads"]
            nodes.append(helper.make_node("Attention", operands, ["out_heads"], scale=scale))
        nodes.append(helper.make_node("Transpose", ["out_heads"], ["out_tokens"], perm=(0, 2, 1, 3)))
        nodes.append(helper.make_node("Reshape", ["out_tokens", "joined"], ["attended"]))
    nodes.append(helper.make_node("Add", ["hidden", "attended"], ["out"]))
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, tokens, heads * size]) for name in ("hidden", "out")
    ]
    graph = helper.make_graph(nodes, "block", tensors[:1], tensors[1:], constants)
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def planned_block(layout: Layout, plan: Plan) -> ModelProto:
    """The same block by a plan of one block."""
    with tempfile.TemporaryDirectory(prefix="fna-block-") as folder:
        exact, planned = (Path(folder) / name for name in ("exact.onnx", "planned.onnx"))
        save_model(exact_block(layout), exact)
        graft(exact, planned, GraftOptions(plan=plan, check=False))
        return load_onnx(planned)
