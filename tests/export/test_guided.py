"""Landmarks that include and exclude tokens in ONNX files: the operators' bodies, traced and grafted files, both lowerings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from seen_landmarks import seen_landmarks

from fna.errors import InvalidLandmarksError
from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.operators.farthest_point_sampling import FARTHEST_POINT_SAMPLING
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.guided_features import GUIDED_FEATURES
from fna.export.operators.guided_grid import GUIDED_GRID
from fna.export.operators.guided_picks import GUIDED_PICKS
from fna.export.operators.landmark_roles import LANDMARK_ROLES
from fna.export.operators.largest_norm_roles import LARGEST_NORM_ROLES
from fna.export.operators.record import DOMAIN, DOMAIN_VERSION, Operator
from fna.export.operators.registry import attach_functions, fna_nodes
from fna.export.passes.lower import lower
from fna.export.sources.loading import LoadedModel
from fna.export.surgery.graft import GraftOptions, graft
from fna.export.trace import TraceOptions, trace_model
from fna.patching import patch, unpatch
from fna.plan import BlockPlan, MaskPlan, Plan, TokenRange, uniform_plan
from fna.samplers.common.roles import guided_landmarks

TOKENS = 48


def run(model: ModelProto, inputs: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, inputs)


def guided_file(method: str, opset: int, landmarks: int, prefix: int) -> ModelProto:
    """A file that chooses landmarks by our operators; every tensor's sizes are open."""

    def node(operator: Operator, inputs: list[str], outputs: list[str], **settings: Any) -> onnx.NodeProto:
        return operator.make_node(inputs, outputs, outputs[0], **settings)

    sizes = {"num_landmarks": landmarks, "prefix_tokens": 0 if method == "fps" else prefix}
    nodes = [node(LANDMARK_ROLES, ["include", "exclude"], ["role"], **sizes)]
    outputs = ["landmarks"]
    if method == "fps":
        nodes += [
            node(GUIDED_FEATURES, ["features", "role"], ["guided"]),
            node(FARTHEST_POINT_SAMPLING, ["guided"], ["picks"], num_landmarks=landmarks),
            node(GUIDED_PICKS, ["role", "picks"], ["landmarks"], num_landmarks=landmarks),
        ]
    else:
        if method == "norm-grid":
            nodes.append(node(LARGEST_NORM_ROLES, ["features", "role"], ["roles"], **sizes))
        last = "roles" if method == "norm-grid" else "role"
        nodes.append(node(GUIDED_GRID, [last], ["landmarks", "bias"], **sizes, middles=int(method == "norm-grid")))
        outputs.append("bias")
    kinds = {"features": TensorProto.FLOAT, "include": TensorProto.INT32, "exclude": TensorProto.INT32}
    ranks = {"features": 3}
    inputs = [
        helper.make_tensor_value_info(name, kind, [f"{name}{axis}" for axis in range(ranks.get(name, 2))])
        for name, kind in kinds.items()
    ]
    results = [
        helper.make_tensor_value_info(name, kind, [f"{name}0", landmarks])
        for name, kind in (("landmarks", TensorProto.INT32), ("bias", TensorProto.FLOAT))
        if name in outputs
    ]
    graph = helper.make_graph(nodes, "g", inputs, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def masks(seed: int, share: float, rows: int) -> np.ndarray:
    return (np.random.default_rng(seed).random((rows, TOKENS)) < share).astype(np.int32)


@pytest.mark.parametrize("opset", [LOWEST_OPSET, 17, 18, HIGHEST_OPSET])
@pytest.mark.parametrize("method", ["fps", "grid", "norm-grid"])
def test_files_choose_the_landmarks_and_weights_that_pytorch_chooses(method: Any, opset: int) -> None:
    """For no token, some, nearly all, and for all of them; with masks per image and for all images."""
    features = torch.randn(3, TOKENS, 8)
    for landmarks, prefix in ((12, 1), (3, 1), (20, 5), (7, 0)):
        model = guided_file(method, opset, landmarks, prefix)
        for form in (model, lower(model, "portable")) if landmarks == 12 else (model,):
            session = onnxruntime.InferenceSession(form.SerializeToString())
            names = {item.name for item in session.get_inputs()}
            for seed, (wanted, barred) in enumerate([(0, 0), (0.1, 0.1), (0.05, 0.9), (1, 1), (0.9, 0.05)]):
                include, exclude = masks(seed, wanted, 3), masks(seed + 9, barred, 1 + seed % 2 * 2)
                feeds = {"features": features.numpy(), "include": include, "exclude": exclude}
                given = session.run(None, {name: array for name, array in feeds.items() if name in names})
                expected = guided_landmarks(
                    features,
                    landmarks,
                    method=method,
                    include=torch.from_numpy(include),
                    exclude=torch.from_numpy(exclude),
                    prefix_tokens=prefix,
                )
                np.testing.assert_array_equal(given[0], expected[0].numpy())
                for row in given[0].tolist():
                    assert len(set(row)) == landmarks
                if len(given) > 1:
                    np.testing.assert_allclose(given[1], expected[1].numpy(), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- whole files


MASSIVE, ARTIFACT = ({"blocks": "0-3", "tokens": tokens} for tokens in ("massive", "artifact"))
PLANS = {
    "grid and norm-grid, massive in, others out": Plan(
        num_blocks=4,
        blocks=(
            BlockPlan(block=1, landmarks=6),
            BlockPlan(block=2, landmarks=6, heads=(1,)),
            BlockPlan(block=3, landmarks=7, sampler="norm-grid"),
        ),
        landmarks_include=(TokenRange(**MASSIVE),),
        landmarks_exclude=(TokenRange(blocks="1", tokens="artifact"), TokenRange(blocks="3", tokens=(3, 9))),
    ),
    "fps, artifacts out, massive masked": Plan(
        num_blocks=4,
        blocks=(
            BlockPlan(block=0, landmarks=6, sampler="fps"),
            BlockPlan(block=2, landmarks=6, sampler="fps", feature="query"),
        ),
        landmarks_exclude=(TokenRange(**ARTIFACT),),
        landmarks_include=(TokenRange(**MASSIVE),),
        masks=(MaskPlan(blocks="2-3", tokens="massive"),),
        method="published",
    ),
}


def run_torch(model: LoadedModel, plan: Plan, pixels: np.ndarray) -> tuple[list[Any], list[Any]]:
    """The outputs, and the landmarks of every FNA block."""
    patch(model.module, plan)
    try:
        with torch.inference_mode(), seen_landmarks() as seen:
            outputs = [tensor.numpy() for tensor in model.module(torch.from_numpy(pixels))]
    finally:
        unpatch(model.module)
    return outputs, [landmarks.numpy() for landmarks in seen]


def run_with_landmarks(model: ModelProto, pixels: np.ndarray) -> tuple[list[Any], list[Any]]:
    names = [node.input[3] for node in fna_nodes(model.graph) if FAST_NYSTROM_ATTENTION.is_called_by(node)]
    shown = ModelProto()
    shown.CopyFrom(model)
    count = len(shown.graph.output)
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    values = run(shown, {model.graph.input[0].name: pixels})
    found = dict(zip(dict.fromkeys(names), values[count:], strict=True))
    return values[:count], [found[name] for name in names]


def without(plan: Plan) -> Plan:
    return plan.model_copy(update={"landmarks_include": (), "landmarks_exclude": ()})


@pytest.mark.parametrize("name", PLANS)
def test_traced_and_grafted_files_compute_what_patched_pytorch_computes(
    planted_model: LoadedModel, planted_file: Path, name: str, tmp_path: Path
) -> None:
    plan = PLANS[name]
    pixels = torch.randn(3, 3, 56, 56).numpy()
    expected, landmarks = run_torch(planted_model, plan, pixels)
    _, plain = run_torch(planted_model, without(plan), pixels)
    assert all(not np.array_equal(*pair) for pair in zip(landmarks, plain, strict=True)), "the plan asks for nothing"
    traced, metadata = trace_model(planted_model, plan, TraceOptions(56, 56))
    assert metadata.plan.landmarks_include == plan.landmarks_include
    result = graft(planted_file, tmp_path / "out.onnx", GraftOptions(plan=plan))
    assert result.proof is not None
    assert not result.proof.failed
    for model in (traced, onnx.load(tmp_path / "out.onnx")):
        outputs, chosen = run_with_landmarks(model, pixels)
        for given, wanted in zip(chosen, landmarks, strict=True):
            np.testing.assert_array_equal(given, wanted)
        portable = run(lower(model, "portable"), {model.graph.input[0].name: pixels})
        for given, inlined, wanted in zip(outputs, portable, expected, strict=True):
            np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(inlined, wanted, rtol=1e-3, atol=1e-4)
        stripped = {node.op_type for node in fna_nodes(lower(model, "plugin").graph)}
        assert stripped == {FAST_NYSTROM_ATTENTION.name, *([FARTHEST_POINT_SAMPLING.name] if "fps" in name else [])}
        if not plan.masks:
            assert [entry.version for entry in model.opset_import if entry.domain == DOMAIN] == [DOMAIN_VERSION]


def test_an_open_image_size_takes_them_too(planted_model: LoadedModel) -> None:
    plan = uniform_plan(
        4,
        layers="2",
        landmarks=6,
        landmarks_include=(TokenRange(**MASSIVE),),
        landmarks_exclude=(TokenRange(**ARTIFACT),),
    )
    model, _ = trace_model(planted_model, plan, TraceOptions(56, 56, dynamic_size=True))
    for height, width in ((56, 56), (98, 56)):
        pixels = torch.randn(1, 3, height, width).numpy()
        expected, landmarks = run_torch(planted_model, plan, pixels)
        outputs, chosen = run_with_landmarks(model, pixels)
        np.testing.assert_array_equal(chosen[0], landmarks[0])
        for given, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(given, wanted, rtol=2e-3, atol=5e-4)


def test_sizes_that_leave_no_choice_are_refused_before_tracing(planted_model: LoadedModel) -> None:
    plan = uniform_plan(4, layers="2", landmarks=16, landmarks_exclude=(TokenRange(**MASSIVE),))
    with pytest.raises(InvalidLandmarksError, match="block 2: landmarks_exclude leaves 15 of 17 tokens"):
        trace_model(planted_model, plan, TraceOptions(56, 56))
