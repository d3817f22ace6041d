"""What graft makes of attention as models, exporters and optimisers write it: counts known by construction, numerics checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import transformers
from fna.export.surgery.graft import GraftOptions, GraftResult, graft, inspect_file
from fna.export.surgery.rows import Decision
from torch import nn

from fna.errors import FnaError
from tests.surgery import optimisers, zoo
from tests.surgery.conftest import Export

SETTINGS = GraftOptions(landmarks=3)


def graft_and_compare(path: Path, tmp_path: Path, options: GraftOptions = SETTINGS) -> GraftResult:
    """Graft a file; what was replaced must be proven, and the result must still run and look like its original."""
    output = tmp_path / "out.onnx"
    result = graft(path, output, options)
    assert result.proof is not None
    assert len(result.proof.block_errors) == result.replaced
    onnx.checker.check_model(str(output), full_check=True)
    before, after = onnx.load(path), onnx.load(output)
    assert [item.name for item in after.graph.output] == [item.name for item in before.graph.output]
    assert sum(node.domain == "fna" for node in after.graph.node) >= result.replaced
    return result


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("batch", ["dynamic", "static"])
@pytest.mark.parametrize("case", zoo.PLAIN, ids=lambda case: case.name)
def test_plain_attention_is_replaced_however_it_is_written(case: zoo.Case, batch: str, export: Export, tmp_path: Path):
    path = export(case.name, case.make, batch=batch)
    result = graft_and_compare(path, tmp_path)
    assert (result.replaced, result.refused) == (case.replaced, case.refused)
    row = result.rows[0]
    expected = 1.0 if case.name == "scale_none" else (row.head_size or 0) ** -0.5
    assert row.scale == pytest.approx(expected, rel=1e-5)
    assert result.prefix_tokens == (1 if case.classes else 0)


@pytest.mark.parametrize("case", zoo.REFUSED, ids=lambda case: case.name)
def test_other_attention_is_refused_by_name(case: zoo.Case, export: Export, tmp_path: Path):
    path = export(case.name, case.make)
    rows = inspect_file(path)
    assert [row.decision for row in rows] == [Decision.REFUSED] * case.refused
    assert all(case.reason in row.reason for row in rows), [row.reason for row in rows]
    with pytest.raises(FnaError, match="nothing was replaced"):
        graft(path, tmp_path / "out.onnx", SETTINGS)
    assert not (tmp_path / "out.onnx").exists()


DYNAMO = ("core_sdpa", "packed_timm", "rotary", "core_true_mask", "torch_mha_sequence_first")


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("name", DYNAMO)
def test_the_dynamo_exporter_is_understood(name: str, opset: int, export: Export, tmp_path: Path):
    case = next(case for case in zoo.PLAIN if case.name == name)
    path = export(name, case.make, exporter="dynamo", opset=opset)
    assert graft_and_compare(path, tmp_path).replaced == 2


@pytest.mark.parametrize("opset", [14, 15, 16, 18, 20])
def test_every_opset_of_the_torchscript_exporter(opset: int, export: Export, tmp_path: Path):
    path = export("core_sdpa", lambda: zoo.Vit(lambda: zoo.Separate(core="sdpa")), opset=opset)
    assert graft_and_compare(path, tmp_path).replaced == 2


OPTIMISED = [
    ("core_sdpa", "onnxslim", 2),
    ("packed_timm", "onnxslim", 2),
    ("scale_scores_div", "ort_basic", 2),
    ("scale_scores_div", "ort_extended", 2),  # FusedMatMul
    ("scale_scores_div", "ort_all", 2),  # NCHWc convolutions
    ("torch_mha", "ort_extended", 2),  # FusedMatMul with a transposed batch
    ("scale_scores_div", "fusion_vit", 2),  # com.microsoft Attention
    ("scale_scores_div", "fusion_mha", 2),  # com.microsoft MultiHeadAttention
    ("post_norm", "fusion_clip", 2),
    ("core_einsum", "ort_extended", 2),
    ("core_sdpa", "float16", 2),
    ("packed_timm", "float16_io", 2),  # not in topological order
    ("positioned", "float16_io", 2),
    ("core_sdpa", "quantized_dynamically", 2),  # projections only
    ("core_sdpa", "quantized", 0),  # attention inside QDQ pairs
    ("causal", "ort_extended", 0),
    ("position_bias", "fusion_vit", 0),
    ("grouped_heads", "onnxslim", 0),
]


@pytest.mark.parametrize(("name", "optimiser", "replaced"), OPTIMISED)
def test_optimised_files_are_understood(name: str, optimiser: str, replaced: int, export: Export, tmp_path: Path):
    case = next(case for case in (*zoo.PLAIN, *zoo.REFUSED) if case.name == name)
    source = export(name, case.make, batch="static" if optimiser.startswith("fusion") else "dynamic")
    path = tmp_path / "optimised.onnx"
    optimisers.OPTIMISERS[optimiser](source, path)
    rows = inspect_file(path)
    assert len(rows) == 2
    if replaced:
        assert graft_and_compare(path, tmp_path).replaced == replaced
    else:
        assert [row.decision for row in rows] == [Decision.REFUSED] * 2


def test_the_optimisers_wrote_what_they_are_tested_for(export: Export, tmp_path: Path):
    source = export("scale_scores_div", lambda: zoo.Vit(lambda: zoo.Separate("scores_div")), batch="static")
    wanted = {"fusion_vit": "Attention", "fusion_mha": "MultiHeadAttention", "ort_extended": "FusedMatMul"}
    for optimiser, op_type in wanted.items():
        optimisers.OPTIMISERS[optimiser](source, tmp_path / "optimised.onnx")
        nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
        assert any(node.op_type == op_type and node.domain == "com.microsoft" for node in nodes), optimiser


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, object], int, int, int | None]] = {
    # name: model, config, extra settings, replaced, refused, prefix tokens
    "vit": ("ViTModel", "ViTConfig", {}, 2, 0, 1),
    "deit": ("DeiTModel", "DeiTConfig", {}, 2, 0, 2),
    "dinov2": ("Dinov2Model", "Dinov2Config", {}, 2, 0, 1),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 3}, 2, 0, 4),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", {}, 2, 0, 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}, 2, 1, 0),
    "ijepa": ("IJepaModel", "IJepaConfig", {}, 2, 0, 0),
    "dpt": ("DPTModel", "DPTConfig", {"backbone_out_indices": [0, 1]}, 2, 0, 1),
    "yolos": ("YolosModel", "YolosConfig", {"image_size": [32, 32], "num_detection_tokens": 3}, 2, 0, 1),
    "beit": ("BeitModel", "BeitConfig", {"use_relative_position_bias": True}, 0, 2, None),
}


def build_transformers_model(name: str, implementation: str) -> nn.Module:
    model, config, extra, *_ = TRANSFORMERS[name]
    settings = getattr(transformers, config)(**{**SIZES, **extra})
    built = getattr(transformers, model)._from_config(settings, attn_implementation=implementation)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = built

        def forward(self, x):
            output = self.model(x)
            return output.last_hidden_state, output.pooler_output if output.get("pooler_output") is not None else None

    return Plain()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_models(name: str, implementation: str, export: Export, tmp_path: Path):
    *_, replaced, refused, prefix = TRANSFORMERS[name]
    path = export(f"{name}_{implementation}", lambda: build_transformers_model(name, implementation))
    rows = inspect_file(path)
    assert sum(row.decision is Decision.REFUSED for row in rows) == refused
    assert sum(row.decision is Decision.ELIGIBLE for row in rows) == replaced
    if replaced:
        assert graft_and_compare(path, tmp_path).prefix_tokens == prefix


@pytest.mark.parametrize(
    ("name", "sizes", "opset"), [("dinov3", "dynamic", 20), ("clip", "static", 23), ("dinov2", "static", 21)]
)
def test_transformers_models_through_dynamo(name: str, sizes: str, opset: int, export: Export, tmp_path: Path):
    make: Callable[[], nn.Module] = lambda: build_transformers_model(name, "sdpa")  # noqa: E731
    path = export(f"{name}_sdpa", make, exporter="dynamo", opset=opset, sizes=sizes)
    result = graft_and_compare(path, tmp_path)
    assert result.replaced == 2
    if sizes == "dynamic":
        assert len(set(result.rows[0].tokens)) > 1
        for height, width in ((32, 32), (48, 64)):
            run(tmp_path / "out.onnx", {"x": np.zeros((1, 3, height, width), np.float32)})
