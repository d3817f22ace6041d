"""Masked keys in ONNX files: the bodies of version 2, of exact masked attention and of the finders, traced and grafted files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from fna.attention import fast_nystrom_attention
from fna.export.operators.artifact_tokens import ARTIFACT_TOKENS
from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.masked_attention import MASKED_ATTENTION
from fna.export.operators.massive_tokens import MASSIVE_TOKENS
from fna.export.operators.record import DOMAIN, MASKED_DOMAIN_VERSION, Operator
from fna.export.operators.registry import attach_functions, fna_nodes, is_attention, node_attributes
from fna.export.passes.lower import lower
from fna.export.sources.loading import LoadedModel
from fna.export.surgery.graft import GraftOptions, graft
from fna.export.trace import TraceOptions, trace_model
from fna.patching import patch, unpatch
from fna.plan import BlockPlan, MaskPlan, Plan, uniform_plan
from fna.special_tokens import artifact_tokens_mask, masked_attention, massive_tokens_mask

OPSETS = range(LOWEST_OPSET, HIGHEST_OPSET + 1)
NUMPY = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.INT32: np.int32}


def node_model(
    operator: Operator,
    inputs: dict[str, int],
    outputs: dict[str, int],
    opset: int,
    element: int = TensorProto.FLOAT,
    **settings: Any,
) -> ModelProto:
    """A file with one node of ours and its function; every tensor's sizes are open."""
    ranks = {"query": 4, "key": 4, "value": 4, "out": 4, "hidden": 3}

    def info(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, [f"{name}{axis}" for axis in range(ranks.get(name, 2))])

    node = operator.make_node(list(inputs), list(outputs), "/blocks.3/fna", **settings)
    graph = helper.make_graph([node], "g", [info(*i) for i in inputs.items()], [info(*o) for o in outputs.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    attach_functions(model, element)
    onnx.checker.check_model(model, full_check=True)
    return model


def attention_model(opset: int, element: int = TensorProto.FLOAT, *, sink: bool = False) -> ModelProto:
    inputs = dict.fromkeys(("query", "key", "value"), element)
    inputs |= {"landmarks": TensorProto.INT32, "landmark_bias": TensorProto.FLOAT, "key_mask": TensorProto.INT32}
    return node_model(
        FAST_NYSTROM_ATTENTION, inputs, {"out": element}, opset, element,
        scale=0.25, iterations=6, exact_rows=1, sink=int(sink),
    )  # fmt: skip


def run(model: ModelProto, inputs: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs)


def make_inputs(landmark_rows: int, mask_rows: int, element: int = TensorProto.FLOAT) -> dict[str, Any]:
    tensors = {name: torch.randn(2, 3, 37, 16).numpy().astype(NUMPY[element]) for name in ("query", "key", "value")}
    landmarks = torch.stack([torch.randperm(37)[:9] for _ in range(landmark_rows)]).int().numpy()
    mask = (torch.rand(mask_rows, 37) < 0.2).int().numpy()
    bias = torch.rand(landmark_rows, 9).numpy()
    return {**tensors, "landmarks": landmarks, "landmark_bias": bias, "key_mask": mask}


def twin(inputs: dict[str, Any], *, sink: bool) -> Any:
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return fast_nystrom_attention(
        tensors["query"], tensors["key"], tensors["value"], tensors["landmarks"], landmark_bias=tensors["landmark_bias"],
        scale=0.25, exact_rows=True, key_mask=tensors["key_mask"], sink=sink,
    ).numpy()  # fmt: skip


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("opset", OPSETS)
def test_the_masked_body_equals_pytorch_inlined_or_not(opset: int, sink: bool) -> None:
    model = attention_model(opset, sink=sink)
    rows = 1 + opset % 2
    inputs = make_inputs(rows, 3 - rows)
    for form in (model, lower(model, "portable")):
        np.testing.assert_allclose(run(form, inputs)[0], twin(inputs, sink=sink), rtol=0, atol=2e-5)


def test_the_masked_body_takes_half_precision() -> None:
    inputs = make_inputs(2, 2, TensorProto.FLOAT16)
    out = run(attention_model(18, TensorProto.FLOAT16, sink=True), inputs)[0]
    assert out.dtype == np.float16
    np.testing.assert_allclose(out, twin(inputs, sink=True), rtol=2e-3, atol=2e-3)


def test_a_mask_of_zeros_gives_the_bits_of_version_1() -> None:

    inputs = make_inputs(1, 1)
    inputs["key_mask"][:] = 0
    kinds = dict.fromkeys(("query", "key", "value"), TensorProto.FLOAT)
    kinds |= {"landmarks": TensorProto.INT32, "landmark_bias": TensorProto.FLOAT}
    plain = node_model(
        FAST_NYSTROM_ATTENTION, kinds, {"out": TensorProto.FLOAT}, 18, scale=0.25, iterations=6, exact_rows=1
    )
    expected = run(plain, {name: array for name, array in inputs.items() if name != "key_mask"})[0]
    for sink in (False, True):
        np.testing.assert_array_equal(run(attention_model(18, sink=sink), inputs)[0], expected)


def test_only_files_with_a_mask_import_version_2() -> None:
    (node,) = fna_nodes(lower(attention_model(18), "plugin").graph)
    assert len(node.input) == 6
    assert node_attributes(node)["plugin_version"] == "2"
    versions = {entry.domain: entry.version for entry in attention_model(18).opset_import}
    assert versions[DOMAIN] == 2
    assert FAST_NYSTROM_ATTENTION.schema(MASKED_DOMAIN_VERSION).since_version == 2
    assert FAST_NYSTROM_ATTENTION.schema().since_version == 1


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("opset", OPSETS)
def test_exact_masked_attention_equals_pytorch(opset: int, sink: bool) -> None:
    inputs = make_inputs(1, 1 + opset % 2)
    kinds = {**dict.fromkeys(("query", "key", "value"), TensorProto.FLOAT), "key_mask": TensorProto.INT32}
    model = node_model(MASKED_ATTENTION, kinds, {"out": TensorProto.FLOAT}, opset, scale=0.25, sink=int(sink))
    query, key, value, mask = (torch.from_numpy(inputs[name]) for name in kinds)
    for form in (model, lower(model, "plugin")):
        out = run(form, {name: inputs[name] for name in kinds})[0]
        np.testing.assert_allclose(
            out, masked_attention(query, key, value, mask, 0.25, sink).numpy(), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("opset", OPSETS)
def test_massive_tokens_are_found_as_in_pytorch(opset: int) -> None:
    hidden = torch.nn.functional.normalize(torch.randn(3, 60, 8), dim=-1)
    hidden[0, [0, 5, 6]] *= 20
    hidden[2, 59] *= 3.1
    model = node_model(MASSIVE_TOKENS, {"hidden": 1}, {"key_mask": TensorProto.INT32}, opset, prefix_tokens=1)
    expected = massive_tokens_mask(hidden, 1).numpy()
    assert expected.sum() == 3
    for form in (model, lower(model, "portable")):
        np.testing.assert_array_equal(run(form, {"hidden": hidden.numpy()})[0], expected)


@pytest.mark.parametrize("opset", OPSETS)
def test_artifact_tokens_are_found_as_in_pytorch(opset: int) -> None:
    query, key = torch.randn(2, 3, 60, 8), torch.randn(2, 3, 60, 8)
    model = node_model(
        ARTIFACT_TOKENS, {"query": 1, "key": 1}, {"key_mask": TensorProto.INT32}, opset, scale=0.25, prefix_tokens=2
    )
    expected = artifact_tokens_mask(query, key, 0.25, 2).numpy()
    assert 0 < expected.sum() < expected.size
    for form in (model, lower(model, "portable")):
        np.testing.assert_array_equal(run(form, {"query": query.numpy(), "key": key.numpy()})[0], expected)


# ---------------------------------------------------------------- whole files

MASKS = {
    "massive": (MaskPlan(blocks="1-3", tokens="massive", sink=True),),
    "artifact": (MaskPlan(blocks="0-1", tokens="artifact"), MaskPlan(blocks="3", tokens="artifact", sink=True)),
    "indices": (MaskPlan(blocks="0-3", tokens=(3, 9)),),
}


def run_torch(model: LoadedModel, plan: Plan, pixels: np.ndarray) -> list[Any]:
    patch(model.module, plan)
    try:
        with torch.inference_mode():
            return [tensor.numpy() for tensor in model.module(torch.from_numpy(pixels))]
    finally:
        unpatch(model.module)


HEADS = {"massive": ((0, 1), (1,)), "artifact": ((1,), None), "indices": ((0,), (0, 1))}
"""Of blocks 1 and 2: all by number, some, all."""


def mask_plan(tokens: str, heads: Any = (None, None)) -> Plan:
    """Blocks 1 and 2 are FNA, in the heads listed, 0 and 3 exact, so that ranges of masks hold both."""
    blocks = tuple(BlockPlan(block=1 + place, landmarks=6, heads=listed) for place, listed in enumerate(heads))
    return Plan(num_blocks=4, blocks=blocks, masks=MASKS[tokens])


@pytest.mark.parametrize("tokens", sorted(MASKS))
def test_a_traced_file_computes_what_patched_pytorch_computes_in_all_heads_or_some(
    planted_model: LoadedModel, tokens: str
) -> None:
    plan = mask_plan(tokens, HEADS[tokens])
    model, metadata = trace_model(planted_model, plan, TraceOptions(56, 56))
    assert metadata.plan.masks == plan.masks
    pixels = torch.randn(3, 3, 56, 56).numpy()
    expected = run_torch(planted_model, plan, pixels)
    unmasked = run_torch(planted_model, plan.model_copy(update={"masks": ()}), pixels)
    for form in (model, lower(model, "portable")):
        for given, wanted, other in zip(run(form, {"pixel_values": pixels}), expected, unmasked, strict=True):
            np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-4)
            assert np.abs(wanted - other).max() > 1e-2
    names = []
    for block in range(4):
        entry, masked = plan.find(block), block in plan.masked_blocks
        divided = entry is not None and entry.heads is not None and len(entry.heads) < 2
        names += [f"/blocks.{block}/{FAST_NYSTROM_ATTENTION.name}"] * (entry is not None)
        names += [f"/blocks.{block}/{MASKED_ATTENTION.name}"] * (masked and (divided or entry is None))
    assert [node.name for node in fna_nodes(model.graph) if is_attention(node.domain, node.op_type)] == names
    kept = {node.op_type for node in fna_nodes(lower(model, "plugin").graph)}
    assert kept == {FAST_NYSTROM_ATTENTION.name}
    for node in fna_nodes(model.graph):
        if FAST_NYSTROM_ATTENTION.is_called_by(node):
            masked = plan.find_mask(int(node.name.split("/")[1].split(".")[1])) is not None
            assert (len(node.input), node_attributes(node)["plugin_version"]) == ((6, "2") if masked else (5, "1"))


def test_masks_go_with_an_open_image_size_and_half_precision(planted_model: LoadedModel) -> None:
    plan = uniform_plan(4, layers="2", landmarks=6, masks=(MaskPlan(blocks="1-3", tokens="massive"),))
    model, _ = trace_model(planted_model, plan, TraceOptions(56, 56, dynamic_size=True))
    for size in (56, 98):
        pixels = torch.randn(1, 3, size, size).numpy()
        for given, wanted in zip(
            run(model, {"pixel_values": pixels}), run_torch(planted_model, plan, pixels), strict=True
        ):
            np.testing.assert_allclose(given, wanted, rtol=2e-3, atol=5e-4)
    model, _ = trace_model(planted_model, plan, TraceOptions(56, 56, precision="fp16"))
    given, wanted = run(model, {"pixel_values": pixels[..., :56, :56].astype(np.float16)})[0], None
    wanted = run_torch(planted_model, plan, np.ascontiguousarray(pixels[..., :56, :56]))[0]
    assert np.linalg.norm(given - wanted) <= 3e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("tokens", sorted(MASKS))
def test_a_grafted_file_masks_as_the_traced_one(
    planted_model: LoadedModel, planted_file: Path, tokens: str, tmp_path: Path
) -> None:
    plan = mask_plan(tokens)
    result = graft(planted_file, tmp_path / "out.onnx", GraftOptions(plan=plan))
    assert result.proof is not None
    assert not result.proof.failed
    masked_exact = {0, 3} & plan.masked_blocks
    assert result.replaced == 2 + len(masked_exact)
    assert len(result.proof.fna_errors) == result.replaced
    pixels = torch.randn(3, 3, 56, 56).numpy()
    model = onnx.load(tmp_path / "out.onnx")
    for form in (model, lower(model, "portable")):
        for given, wanted in zip(
            run(form, {form.graph.input[0].name: pixels}), run_torch(planted_model, plan, pixels), strict=True
        ):
            np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-4)


def test_a_model_without_massive_tokens_comes_through_bit_by_bit(tiny_model: LoadedModel) -> None:
    """Its file with a mask computes what its file without one computes; blocks 1 and 2 are FNA, 3 is exact."""
    pixels = torch.randn(2, 3, 56, 56).numpy()
    plain, masked = (
        trace_model(tiny_model, uniform_plan(4, layers="1-2", landmarks=6, masks=masks), TraceOptions(56, 56))[0]
        for masks in ((), (MaskPlan(blocks="1-3", tokens="massive"),))
    )
    used = {operator.name for operator in (MASSIVE_TOKENS, FAST_NYSTROM_ATTENTION, MASKED_ATTENTION)}
    assert {node.op_type for node in fna_nodes(masked.graph)} == used
    for given, wanted in zip(run(masked, {"pixel_values": pixels}), run(plain, {"pixel_values": pixels}), strict=True):
        np.testing.assert_array_equal(given, wanted)
