"""What graft makes of attention as models, exporters and optimisers write it: counts known by construction, numerics checked."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import surgery_optimisers as optimisers
import surgery_zoo as zoo
from surgery_helpers import SETTINGS, TRANSFORMERS, Export, build_transformers_model, graft_and_compare

from fna.errors import FnaError
from fna.export.surgery.graft import graft, inspect_file
from fna.export.surgery.recognise.rows import Decision


@pytest.mark.parametrize(
    ("case", "batch"),
    [
        *(pytest.param(case, "dynamic", id=f"{case.name}-dynamic") for case in zoo.PLAIN),
        *(pytest.param(case, "static", id=f"{case.name}-static") for case in zoo.PLAIN[::3]),
    ],
)
def test_plain_attention_is_replaced_however_it_is_written(case: zoo.Case, batch: str, export: Export, tmp_path: Path):
    path = export(case.name, case.make, batch=batch)
    result = graft_and_compare(path, tmp_path)
    assert (result.replaced, result.refused) == (case.replaced, case.refused)
    row = result.rows[0]
    if case.name != "cosine":
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


@pytest.mark.parametrize("opset", [14, 15, 16, 18, 20])
def test_every_opset_of_the_torchscript_exporter(opset: int, export: Export, tmp_path: Path):
    path = export("core_sdpa", lambda: zoo.Vit(lambda: zoo.Separate(core="sdpa")), opset=opset)
    assert graft_and_compare(path, tmp_path).replaced == 2


OPTIMISED = [
    ("core_sdpa", "onnxslim", 2),
    ("packed_timm", "onnxslim", 2),
    ("core_sdpa", "onnxsim", 2),
    ("packed_timm", "onnxsim", 2),
    ("torch_mha", "onnxsim", 2),
    ("position_bias", "onnxsim", 0),
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
