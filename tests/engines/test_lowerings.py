"""Which form of a file each runtime is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import ModelProto, TensorProto, helper

from fna.engines import lowerings as module
from fna.engines.lowerings import (
    LOWERING_RULES,
    ProcessorForm,
    check_fused,
    choose_lowering,
    find_rule,
    processor_form,
    rules_for,
)
from fna.engines.targets import find_targets
from fna.export.operators.farthest_point_sampling import FARTHEST_POINT_SAMPLING
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.registry import attach_functions


@pytest.mark.parametrize(
    ("runtime", "version", "targets", "lowering"),
    [
        ("tensorrt-rtx", "1.7.1.0", "rtx-ada", "fused"),
        ("tensorrt-rtx", "1.10.0", "rtx-ada", "fused"),
        ("tensorrt-rtx", "1.5.0", "rtx-ada", "portable"),
        ("tensorrt", "10.3.0", "jetson-agx-orin", "plugin"),
        ("tensorrt", "10.14.1", "jetson-agx-orin", "plugin"),
        ("tensorrt", "11.4.0.106", "t4", "fused"),
        ("tensorrt", "10.3.0", "t4", "decomposed"),
        ("tensorrt", "11.4.0.106", "l4,t4", "fused"),
        ("onnxruntime", "1.26.0", "l4", "onnxruntime"),
    ],
)
def test_the_lowering_follows_runtime_version_and_target(
    runtime: str, version: str, targets: str, lowering: str
) -> None:
    assert choose_lowering(runtime, version, find_targets(targets)) == lowering  # type: ignore[arg-type]


@pytest.mark.parametrize(("library", "lowering"), [(Path("a.so"), "onnxruntime-kernels"), (None, "onnxruntime-cpu")])
def test_a_processor_is_given_kernels_where_they_can_be_compiled(
    library: Path | None, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_processor_library", lambda: library)
    processor_form.cache_clear()
    assert processor_form() == ProcessorForm(lowering, library)  # type: ignore[arg-type]
    processor_form.cache_clear()


def test_a_device_is_given_a_rule_for_each_version_that_it_may_have() -> None:
    """Rules for versions before the lowest are left out, but for the one that the lowest falls under."""
    both = rules_for({"tensorrt": "10.3", "tensorrt-rtx": "1.3"}, has_kernels=False)
    assert both == (
        ("tensorrt", "10.14", "fused"), ("tensorrt", "0", "decomposed"),
        ("tensorrt-rtx", "1.7", "fused"), ("tensorrt-rtx", "0", "portable"),
    )  # fmt: skip
    assert rules_for({"tensorrt": "10.16"}, has_kernels=False) == (("tensorrt", "10.14", "fused"),)
    assert {lowering for _, _, lowering in rules_for({"tensorrt": "10.3"}, has_kernels=True)} == {"plugin"}


def test_every_runtime_has_a_rule_for_any_version_and_says_how_it_is_known() -> None:
    for rule in LOWERING_RULES:
        assert find_rule(rule.runtime, rule.since) is rule
        assert find_rule(rule.runtime, "0.1").since == "0"
        assert rule.known


def file(order: str) -> ModelProto:
    """A file of samplers (s) and attention nodes (a)."""
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 16, 4]) for name in ("q", "k", "v")]
    floats.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 8]))
    nodes = [
        FARTHEST_POINT_SAMPLING.make_node(["x"], [f"l{place}"], f"sampler_{place}", num_landmarks=4)
        if kind == "s"
        else FAST_NYSTROM_ATTENTION.make_node(["q", "k", "v", "l0", "b"], [f"o{place}"], f"fna_{place}", scale=0.5)
        for place, kind in enumerate(order)
    ]
    graph = helper.make_graph(nodes, "g", [*floats, helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 4])], [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    attach_functions(model, TensorProto.FLOAT)
    return model


def test_a_loop_after_an_fna_block_is_not_built_fused() -> None:
    assert check_fused(file("saa")) is None
    refusal = check_fused(file("sasa"))
    assert refusal is not None
    assert "sampler_2 (FarthestPointSampling)" in refusal
