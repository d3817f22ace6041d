"""FarthestPointSampling and NormGridLandmarks on onnxruntime, against their PyTorch twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto
from operator_files import one_node_model, run

from fna.export.operators.builder import HIGHEST_OPSET, LOWEST_OPSET
from fna.export.operators.farthest_point_sampling import FARTHEST_POINT_SAMPLING
from fna.export.operators.norm_grid_landmarks import NORM_GRID_LANDMARKS
from fna.export.operators.record import Operator
from fna.export.passes.lower import lower
from fna.samplers.fps import farthest_points_reference
from fna.samplers.norm_grid import norm_grid_reference

OPSETS = range(LOWEST_OPSET, HIGHEST_OPSET + 1)


def sampler_model(operator: Operator, opset: int, **attributes: int) -> ModelProto:
    inputs, outputs = {"features": TensorProto.FLOAT}, {"landmarks": TensorProto.INT32}
    return one_node_model(operator, inputs, outputs, opset, **attributes)


@pytest.mark.parametrize("opset", OPSETS)
def test_farthest_points_equal_pytorchs_ties_included(opset: int) -> None:
    features = torch.randn(2, 50, 6)
    features[1, 20:40] = features[1, :20]
    model = sampler_model(FARTHEST_POINT_SAMPLING, opset, num_landmarks=24)
    expected = farthest_points_reference(features, 24).numpy()
    for form in (model, lower(model, "portable")):
        np.testing.assert_array_equal(run(form, {"features": features.numpy()})[0], expected)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24, 50])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_norm_grid_equals_pytorchs(prefix: int, count: int) -> None:
    features = torch.randn(3, 50, 6)
    model = sampler_model(NORM_GRID_LANDMARKS, 18, num_landmarks=count, prefix_tokens=prefix)
    expected = norm_grid_reference(features, count, prefix).numpy()
    np.testing.assert_array_equal(run(model, {"features": features.numpy()})[0], expected)


@pytest.mark.parametrize("opset", OPSETS)
def test_norm_grid_body_exists_for_every_opset(opset: int) -> None:
    features = torch.randn(1, 40, 6)
    model = sampler_model(NORM_GRID_LANDMARKS, opset, num_landmarks=12, prefix_tokens=1)
    for form in (model, lower(model, "portable")):
        np.testing.assert_array_equal(
            run(form, {"features": features.numpy()})[0], norm_grid_reference(features, 12, 1).numpy()
        )
