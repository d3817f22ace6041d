"""Files with masked keys under the error budget: the FNA nodes are compared with FNA under the same mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from broken_files import break_file
from onnx import ModelProto

from fna.export.sources.loading import load_model, wrap_model
from fna.export.sources.running import patched, run_torch
from fna.export.surgery.graft import inspect_file
from fna.export.trace import TraceOptions, trace_model
from fna.files import save_model
from fna.patching import patch, unpatch
from fna.plan import MaskPlan, uniform_plan
from fna.validate.blame.bisect import locate
from fna.validate.blame.inside import compare_block_parts
from fna.validate.budget.block_parts import BlockPart, captured
from fna.validate.budget.chain import Chain, open_chain, open_validated_file
from fna.validate.budget.fna_nodes import NodeProbe, expected_output


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
        with captured(model.module) as seen, torch.inference_mode():
            model.module(pixels)
    finally:
        unpatch(model.module)
    assert len(seen.calls) == 2
    for node in probe.nodes:
        np.testing.assert_allclose(seen.arrays[BlockPart(node.block, "fna")], arrays[node.output], rtol=0, atol=1e-4)

    save_model(proto, tmp_path / "masked.onnx")
    assert [row.family for row in inspect_file(tmp_path / "masked.onnx")] == ["masked", "FNA", "FNA", "MatMul+Softmax"]


MASKED = (MaskPlan(blocks="1-2", tokens=(3, 9, 10), sink=True),)


@pytest.fixture(scope="module")
def masked_file(tiny_files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with FNA under a mask in blocks 1 and 2, traced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tiny_files.folder)
        model = load_model("validate_tiny:tiny")
    proto, _ = trace_model(model, uniform_plan(3, layers="1-2", landmarks=12, masks=MASKED), TraceOptions(112, 112))
    path = tmp_path_factory.mktemp("masked") / "masked.onnx"
    save_model(proto, path)
    return path


def open_file(path: Path) -> Chain:
    return open_chain(open_validated_file(path), None, lambda *_progress: None)


def pixels_of(chain: Chain, tiny):
    return chain.metadata.preprocessing.apply(tiny.images[0][1], chain.height, chain.width)[None]


def test_masked_fna_operators_are_recorded_with_their_masks(tiny, masked_file: Path) -> None:
    chain = open_file(masked_file)
    with patched(chain.model, chain.metadata.plan), captured(chain.model.module) as seen:
        run_torch(chain.model, pixels_of(chain, tiny))
    assert len(seen.calls) == 2
    for call in seen.calls:
        assert call.sink
        assert call.key_mask is not None
        assert call.key_mask[0].nonzero().ravel().tolist() == [3, 9, 10]


def test_bisecting_sees_masked_fna_operators(tiny, masked_file: Path) -> None:
    chain = open_file(masked_file)
    places = compare_block_parts(chain, "export", [pixels_of(chain, tiny)])
    assert [(place.block, place.part) for place in places] == [
        (0, "output"), (1, "fna"), (1, "output"), (2, "fna"), (2, "output"),
    ]  # fmt: skip
    assert all(place.relative_l2 < 1e-5 for place in places)


def mask_another_token(model: ModelProto) -> None:
    """In block 2 alone: its node gets a mask of its own, in which token 4 is masked and no other."""
    node = next(node for node in model.graph.node if node.name == "/blocks.2/FastNystromAttention")
    mask = np.zeros((1, 65), np.int32)
    mask[0, 4] = 1
    model.graph.initializer.append(onnx.numpy_helper.from_array(mask, "another_mask"))
    node.input[5] = "another_mask"


def test_another_mask_in_one_block_is_named(tiny, masked_file: Path, tmp_path: Path) -> None:
    chain = open_file(break_file(masked_file, tmp_path / "broken.onnx", mask_another_token))
    found = locate(chain, "export", 1e-3, pixels_of(chain, tiny))
    assert found is not None
    assert (found.block, found.part) == (2, "fna")
    assert found.cause == "node /blocks.2/FastNystromAttention has another key mask than the model"
