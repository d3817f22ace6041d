"""Whole models on this machine's onnxruntime, plans against the fastest exact form: `python -m studies.model_speed PLAN...`.

Exact attention is timed as traced (MatMul, Softmax, MatMul), as ONNX Attention and as com.microsoft MultiHeadAttention; a plan with
its exact blocks in the first and the last of these forms. A PLAN is as `studies.outside_photographs` has it. All take turns in one
process, batch 1, fp32; milliseconds, median (fastest to slowest).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from onnx import ModelProto, NodeProto, helper

from fna.export.passes.lower import lower
from fna.export.sources.loading import load_model
from fna.export.trace import INPUT_NAME, TraceOptions, export_onnx
from fna.files import load_onnx
from fna.plan import Plan, uniform_plan
from fna.runtime import open_session
from fna.validate.planning.subject import TorchSubject
from studies.outside_photographs import read_plan


def with_multi_head_attention(model: ModelProto, heads: int, head_size: int) -> tuple[ModelProto, int]:
    """A copy in which exact attention of a trace is onnxruntime's own operator, and in how many places."""
    copy = ModelProto()
    copy.CopyFrom(model)
    makers = {output: node for node in copy.graph.node for output in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in copy.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def tokens(name: str) -> str | None:
        """What `[B, H, N, D]` was split from: `[B, N, H D]`."""
        node = makers.get(name)
        while node is not None and node.op_type in ("Mul", "Transpose", "Reshape"):
            shape = makers.get(node.input[0])
            if node.op_type == "Reshape" and (shape is None or shape.op_type == "Add"):
                return str(node.input[0])
            node = shape
        return None

    found = 0
    for softmax in [node for node in copy.graph.node if node.op_type == "Softmax"]:
        scores, product = makers[softmax.input[0]], readers[softmax.output[0]][0]
        if scores.op_type != "MatMul" or product.op_type != "MatMul":
            continue
        operands = [tokens(name) for name in (*scores.input, product.input[1])]
        joined = readers[readers[product.output[0]][0].output[0]][0]
        if None in operands or joined.op_type != "Reshape":
            continue
        fused = helper.make_node("MultiHeadAttention", operands, list(joined.output), domain="com.microsoft",
                                 num_heads=heads, scale=head_size**-0.5)  # fmt: skip
        joined.CopyFrom(fused)
        found += 1
    copy.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return copy, found


def forms(subject: TorchSubject, plan: Plan, name: str, folder: Path) -> dict[str, ModelProto]:
    """The files to time, by what they are called."""
    layout = subject.layout
    path = folder / "model.onnx"
    export_onnx(subject.model, plan, TraceOptions(*layout.resolution, batch=1), path)
    traced = lower(load_onnx(path), "portable")
    fused, count = with_multi_head_attention(traced, layout.heads, layout.head_size)
    exact = layout.num_blocks - len(plan.replaced_blocks)
    whole = exact - sum(1 for block in plan.blocks if block.heads is not None)
    if count < whole:
        raise SystemExit(f"{name}: {count} of {exact} exact blocks could be made MultiHeadAttention")
    result = {name: traced}
    if not plan.replaced_blocks:
        result[f"{name}, ONNX Attention"] = lower(load_onnx(path), "fused")
    return result | ({f"{name}, MultiHeadAttention": fused} if count else {})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*")
    parser.add_argument("--model", default="dinov2-small-saliency")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    side = arguments.resolution
    subject = TorchSubject(load_model(arguments.model), side, side)
    plans = {"exact": uniform_plan(subject.layout.num_blocks, layers="none")}
    plans |= {text: read_plan(text, subject) for text in arguments.plans}
    pixels = np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for text, plan in plans.items():
            for name, model in forms(subject, plan, text, Path(folder)).items():
                sessions[name] = open_session(model, name=name)
    outputs = {name: session.run(None, {INPUT_NAME: pixels}) for name, session in sessions.items()}
    for name in list(outputs)[1:3]:
        np.testing.assert_allclose(outputs[name][0], outputs["exact"][0], atol=2e-3)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(arguments.runs):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {INPUT_NAME: pixels})
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    exact = min(median for name, median in medians.items() if name.startswith("exact"))
    for name, taken in times.items():
        speed = exact / medians[name]
        print(
            f"{name}: {medians[name]:.0f} ms ({min(taken):.0f} to {max(taken):.0f}), {speed:.2f} times the fastest exact"
        )


if __name__ == "__main__":
    main()
