"""A model as small as an engine can be."""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from fna.export.metadata import FileMetadata, write_metadata
from fna.export.operators.farthest_point_sampling import FARTHEST_POINT_SAMPLING
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION
from fna.export.operators.norm_grid_landmarks import NORM_GRID_LANDMARKS
from fna.export.operators.record import Operator
from fna.export.operators.registry import attach_functions
from fna.plan import BlockPlan, Plan


def write_model(
    path: Path,
    *,
    sampler: Operator = FARTHEST_POINT_SAMPLING,
    extra: str | None = None,
    element_type: int = TensorProto.FLOAT,
) -> Path:
    """A file with one FNA block over the patches of 32-pixel images, as small as an engine can be."""
    torch.manual_seed(0)
    pixels = helper.make_tensor_value_info("pixel_values", element_type, ["batch", 3, 32, 32])
    tokens = helper.make_tensor_value_info("tokens", element_type, None)
    numpy_type = helper.tensor_dtype_to_np_dtype(element_type)
    constants = {
        "kernel": torch.randn(32, 3, 4, 4).numpy().astype(numpy_type),
        "key_weights": torch.randn(16).numpy().astype(numpy_type),
        "shape": torch.tensor([0, 2, 16, 64]).numpy(),
        "bias": torch.zeros(1, 8).numpy(),
        "hidden_shape": torch.tensor([0, 64, 32]).numpy(),
    }
    settings = {"num_landmarks": 8, **({"prefix_tokens": 1} if sampler is NORM_GRID_LANDMARKS else {})}
    nodes = [
        helper.make_node("Conv", ["pixel_values", "kernel"], ["patches"], strides=[4, 4], name="patches"),
        helper.make_node("Reshape", ["patches", "shape"], ["flat"], name="flatten"),
        helper.make_node("Transpose", ["flat"], ["heads"], perm=[0, 1, 3, 2], name="heads"),
        helper.make_node("Mul", ["heads", "key_weights"], ["keys"], name="keys"),
        helper.make_node("Reshape", ["heads", "hidden_shape"], ["hidden"], name="hidden"),
        sampler.make_node(["hidden"], ["landmarks"], "/blocks.0/sampler", **settings),
        FAST_NYSTROM_ATTENTION.make_node(
            ["heads", "keys", "heads", "landmarks", "bias"], ["mixed"], "/blocks.0/fna",
            scale=0.25, iterations=6, exact_rows=1,
        ),
        helper.make_node(extra or "Relu", ["mixed"], ["tokens"], name="last"),
    ]  # fmt: skip
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "tiny", [pixels], [tokens], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    attach_functions(model, element_type)
    plan = Plan(num_blocks=1, blocks=(BlockPlan(block=0, landmarks=8, sampler="fps"),), prefix_tokens=0)
    write_metadata(
        model,
        FileMetadata(
            plan=plan, source="tiny", origin="trace", height=32, width=32, patch_size=4,
            precision="fp32" if element_type == TensorProto.FLOAT else "fp16",
        ),
    )  # fmt: skip
    path.write_bytes(model.SerializeToString())
    return path
