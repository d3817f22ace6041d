"""What a file's FNA nodes are compared with, where they have the cheaper core."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto
from operator_files import one_node_model, run

from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.plan import BlockPlan, Plan
from fna.validate.blame.causes import _setting_causes
from fna.validate.budget.fna_nodes import expected_output, list_fna_nodes, planned_settings

PLAN = Plan(num_blocks=4, blocks=(BlockPlan(block=3, landmarks=9),), core="chebyshev", steps=8, low=0.05)


def model_with(**core: Any) -> ModelProto:
    kinds = dict.fromkeys(("query", "key", "value"), TensorProto.FLOAT)
    kinds |= {"landmarks": TensorProto.INT32, "landmark_bias": TensorProto.FLOAT}
    return one_node_model(
        FAST_NYSTROM_ATTENTION, kinds, {"out": TensorProto.FLOAT}, 18, scale=0.25, exact_rows=1, **core
    )


def test_a_node_is_compared_with_its_own_core() -> None:
    model = model_with(core="chebyshev", steps=8, low=0.05)
    arrays: dict[str, Any] = {
        name: np.random.default_rng(place).standard_normal((1, 2, 30, 8), np.float32)
        for place, name in enumerate(("query", "key", "value"))
    }
    arrays |= {"landmarks": np.arange(0, 27, 3, dtype=np.int32)[None], "landmark_bias": np.zeros((1, 9), np.float32)}
    (out,) = run(model, arrays)
    (node,) = list_fna_nodes(model)
    np.testing.assert_allclose(expected_output(node, arrays), out, rtol=0, atol=2e-5)
    (other,) = list_fna_nodes(model_with())
    assert np.abs(expected_output(other, arrays) - out).max() > 1e-2


@pytest.mark.parametrize(
    ("core", "said"),
    [
        ({"core": "chebyshev", "steps": 8, "low": 0.05}, None),
        ({"core": "chebyshev", "steps": 7, "low": 0.05}, "has steps 7, but the plan says 8"),
        ({"core": "chebyshev", "steps": 8, "low": 0.1}, "has low 0.1, but the plan says 0.05"),
        ({}, "has steps 0, but the plan says 8"),
    ],
)
def test_a_node_with_another_core_than_the_plans_is_named(core: dict[str, Any], said: str | None) -> None:
    (node,) = list_fna_nodes(model_with(**core))
    metadata: Any = SimpleNamespace(plan=PLAN, attention_table=None)
    found = [
        text for text in _setting_causes(node, planned_settings(node, metadata), "the plan says") if "exact" not in text
    ]
    assert (found[0].split(" ", 2)[2] if found else None) == said
