"""Files with masked keys under the error budget: the FNA nodes are compared with FNA under the same mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fna.export.files import save_model
from fna.export.sources import wrap_model
from fna.export.surgery.graft import inspect_file
from fna.export.trace import TraceOptions, trace_model
from fna.patching import patch, unpatch
from fna.plan import MaskPlan, uniform_plan
from fna.validate.fna_nodes import NodeProbe, expected_output
from fna.validate.points import Point, captured


def test_nodes_with_a_mask_are_compared_under_it(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14)
    module = Dinov2Model(config).eval()
    model = wrap_model("tests:tiny", module)
    plan = uniform_plan(4, layers="1-2", landmarks=6, masks=(MaskPlan(blocks="0,2", tokens=(3, 9), sink=True),))
    proto, _ = trace_model(model, plan, TraceOptions(56, 56))
    pixels = torch.randn(1, 3, 56, 56)
    probe = NodeProbe(proto, tmp_path, "masked.onnx")
    arrays = probe.run(pixels.numpy())
    assert [(node.block, "key_mask" in node.inputs, node.sink) for node in probe.nodes] == [
        (1, False, False),
        (2, True, True),
    ]
    for node in probe.nodes:
        np.testing.assert_allclose(arrays[node.output], expected_output(node, arrays), rtol=0, atol=1e-5)

    patch(model.module, plan)
    try:
        with captured(model.module, [1, 2]) as seen, torch.inference_mode():
            model.module(pixels)
    finally:
        unpatch(model.module)
    assert len(seen.calls) == 2
    for node in probe.nodes:
        np.testing.assert_allclose(seen.arrays[Point(node.block, "fna")], arrays[node.output], rtol=0, atol=1e-4)

    save_model(proto, tmp_path / "masked.onnx")
    assert [row.family for row in inspect_file(tmp_path / "masked.onnx")] == ["masked", "FNA", "FNA", "MatMul+Softmax"]
