"""Tracing a PyTorch model to an ONNX file in which the chosen blocks are `fna` nodes."""

from __future__ import annotations

import ast
import logging
import math
import platform
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxscript
import onnxscript.optimizer
import torch
from onnx import ModelProto, NodeProto, TensorProto
from onnxscript import opset18, values

from fna import __version__
from fna.errors import InvalidArgumentError, InvalidLandmarksError, ModelSourceError
from fna.export.metadata import FileMetadata, write_metadata
from fna.export.operators.builder import HIGHEST_OPSET
from fna.export.operators.functions import (
    ARTIFACT_TOKENS,
    ATTENTION,
    DOMAIN,
    DOMAIN_VERSION,
    FARTHEST_POINTS,
    GUIDED_FEATURES,
    GUIDED_GRID,
    GUIDED_PICKS,
    LANDMARK_ROLES,
    LARGEST_NORM_ROLES,
    MASKED_ATTENTION,
    MASKED_PLUGIN_FIELDS,
    MASSIVE_TOKENS,
    NORM_GRID,
    PLUGIN_FIELDS,
    attach_functions,
    fna_nodes,
)
from fna.export.operators.schemas import operator_schema
from fna.export.passes.fold_scales import fold_channel_scales
from fna.export.sources.loading import LoadedModel, check_resolution
from fna.files import save_model
from fna.patching import AttentionBlock, find_attention_blocks, patch, unpatch
from fna.plan import Plan
from fna.samplers import DEFAULT_SAMPLER, LandmarkRequest, all_samplers, find_sampler
from fna.samplers.common.roles import check_rooms
from fna.special_tokens import detect_prefix_tokens

Precision = Literal["fp32", "fp16", "bf16"]
TORCH_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ONNX_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
INPUT_NAME = "pixel_values"

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where the exporter notes the modules that a node was traced in, the outermost first."""


@dataclass(frozen=True)
class TraceOptions:
    """What a traced file looks like.

    Attributes:
        height: of the input images, in pixels.
        width: of the input images, in pixels.
        opset: version of the standard operators; None is 18, or 22 for bf16, from which on convolutions take it.
        precision: of weights and activations; FNA computes in fp32 inside whatever this is.
        batch: a fixed batch size; None leaves it open.
        dynamic_size: leave height and width open, where the model can interpolate its position embedding.
    """

    height: int
    width: int
    opset: int | None = None
    precision: Precision = "fp32"
    batch: int | None = None
    dynamic_size: bool = False


def export_onnx(model: LoadedModel, plan: Plan, options: TraceOptions, path: Path) -> FileMetadata:
    """Trace `model` by `plan` and write the ONNX file, whole or not at all.

    The module is patched, cast and restored; it computes afterwards what it did before.

    Args:
        model: from `fna.export.sources.loading.load_model`.
        plan: which blocks are FNA. A plan without blocks gives the dense model.
        options: size, opset and precision.
        path: the file to write; tensors go to `<path>.data` beside it when they exceed 2 GB.

    Returns:
        The metadata written into the file.

    Raises:
        ModelSourceError: for an image size that the model does not take, or if tracing fails.
        InvalidLandmarksError: if a block has more landmarks than tokens.
    """
    proto, metadata = trace_model(model, plan, options)
    save_model(proto, path)
    return metadata


def trace_model(model: LoadedModel, plan: Plan, options: TraceOptions) -> tuple[ModelProto, FileMetadata]:
    """Trace `model` by `plan`; as `export_onnx`, without writing a file."""
    check_resolution(model, options.height, options.width)
    if options.dynamic_size and not model.open_size:
        raise ModelSourceError(
            f"{model.name} has its image size worked into its graph, so height and width cannot be left open; "
            f"trace it at one size, such as {model.native_resolution}"
        )
    blocks = find_attention_blocks(model.module)
    prefix = plan.prefix_tokens if plan.prefix_tokens is not None else detect_prefix_tokens(blocks[0].tower)
    plan.check_fits(model.name, None if options.dynamic_size else (options.height, options.width))
    plan = plan.model_copy(update={"prefix_tokens": prefix})
    if plan.needs_positions and options.dynamic_size:
        raise InvalidArgumentError(
            "the plan depends on where on the image a token is (its landmarks or corrections), so height and width cannot "
            f"be left open; use {DEFAULT_SAMPLER} landmarks without corrections"
        )
    if plan.needs_positions and plan.patches is None:
        patches = (options.height // model.patch_size, options.width // model.patch_size)
        plan = plan.model_copy(update={"patches": patches})
    fixed = next((block.sampler for block in plan.blocks if not find_sampler(block.sampler).takes_open_size), None)
    if options.dynamic_size and fixed is not None:
        raise InvalidArgumentError(
            f"the {fixed} sampler chooses its tokens at export time, so height and width cannot be left open; use {DEFAULT_SAMPLER}"
        )
    _check_landmark_counts(
        plan, (options.height // model.patch_size) * (options.width // model.patch_size) + prefix, prefix
    )
    patch(model.module, plan)
    weights = model.module.state_dict()
    try:
        # Assigned, not copied: a cast there and back would leave the caller with rounded weights.
        typed = {name: _cast(tensor, TORCH_TYPES[options.precision]) for name, tensor in weights.items()}
        model.module.load_state_dict(typed, assign=True)
        program = _run_exporter(model, options)
    finally:
        model.module.load_state_dict(weights, assign=True)
        unpatch(model.module)
    _name_nodes(program, blocks)
    _drop_stack_traces(program)
    fold_channel_scales(program.graph)
    attach_functions(program, ONNX_TYPES[options.precision] if plan.blocks or plan.masks else TensorProto.UNDEFINED)
    metadata = FileMetadata(
        plan=plan,
        preprocessing=model.preprocessing,
        source=model.name,
        origin="trace",
        precision=options.precision,
        height=None if options.dynamic_size else options.height,
        width=None if options.dynamic_size else options.width,
        patch_size=model.patch_size,
        token_outputs=model.token_outputs,
        map_outputs=model.map_outputs,
        tools={
            "fna": __version__,
            "torch": torch.__version__.split("+")[0],
            "onnx": onnx.__version__,
            "onnxscript": onnxscript.__version__,
            "python": platform.python_version(),
        },
    )
    write_metadata(program, metadata)
    return program, metadata


def _choose_opset(options: TraceOptions) -> int:
    lowest = 22 if options.precision == "bf16" else 18
    if options.opset is None:
        return lowest
    if not lowest <= options.opset <= HIGHEST_OPSET:
        raise InvalidArgumentError(
            f"opset {options.opset} was asked for, but a {options.precision} trace needs {lowest} to {HIGHEST_OPSET}"
        )
    return options.opset


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _run_exporter(model: LoadedModel, options: TraceOptions) -> ModelProto:
    dtype = TORCH_TYPES[options.precision]
    opset = _choose_opset(options)
    batch = 2 if options.batch is None else options.batch
    height, width = options.height, options.width
    if options.dynamic_size:
        # Models skip the interpolation of their position embedding at their own, square size; the trace must hold it.
        height, width = model.native_resolution + model.patch_size, model.native_resolution + 2 * model.patch_size
    sample = torch.zeros(batch, 3, height, width, dtype=dtype)
    dynamic: dict[int, Any] = {}
    if options.batch is None:
        dynamic[0] = torch.export.Dim("batch", min=1)
    if options.dynamic_size:
        dynamic[2] = torch.export.Dim("rows", min=2, max=4096 // model.patch_size) * model.patch_size
        dynamic[3] = torch.export.Dim("columns", min=2, max=4096 // model.patch_size) * model.patch_size
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                model.module,
                (sample,),
                dynamo=True,
                input_names=[INPUT_NAME],
                output_names=list(model.output_names),
                dynamic_shapes=(dynamic or None,),
                opset_version=opset,
                custom_translation_table=translation_table(),
                # The exporter's own optimiser folds batch norms into bf16 convolutions as fp32 weights, which no checker passes.
                optimize=options.precision != "bf16",
                verbose=False,
            )
    except Exception as error:  # the exporter wraps failures of many kinds
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ModelSourceError(f"tracing {model.name} to ONNX failed: {reason}") from error
    if program is None:
        raise ModelSourceError(f"tracing {model.name} to ONNX failed: the exporter returned nothing")
    if options.precision == "bf16":
        onnxscript.optimizer.fold_constants(program.model)
    return program.model_proto


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how the exporter writes this project's torch operators: one `fna` node each."""
    opset = values.Opset(DOMAIN, DOMAIN_VERSION)
    attention, farthest, norm_grid = (
        values.Op(opset, name, operator_schema(name)) for name in (ATTENTION, FARTHEST_POINTS, NORM_GRID)
    )

    def write_attention(query, key, value, landmarks, landmark_bias, scale, iterations, exact_rows):  # type: ignore[no-untyped-def]
        bias = landmark_bias if landmark_bias is not None else _zero_bias(landmarks)
        return attention(
            query, key, value, landmarks, bias,
            scale=scale, iterations=iterations, exact_rows=int(exact_rows), **PLUGIN_FIELDS,
        )  # fmt: skip

    masked_attention, massive, artifact = (
        values.Op(opset, name, operator_schema(name)) for name in (MASKED_ATTENTION, MASSIVE_TOKENS, ARTIFACT_TOKENS)
    )
    attention_with_mask = values.Op(opset, ATTENTION, operator_schema(ATTENTION, key_mask=True))

    def write_attention_with_mask(  # type: ignore[no-untyped-def]
        query, key, value, landmarks, landmark_bias, key_mask, scale, iterations, exact_rows, sink
    ):
        bias = landmark_bias if landmark_bias is not None else _zero_bias(landmarks)
        return attention_with_mask(
            query, key, value, landmarks, bias, key_mask,
            scale=scale, iterations=iterations, exact_rows=int(exact_rows), sink=int(sink), **MASKED_PLUGIN_FIELDS,
        )  # fmt: skip

    def write_masked_attention(query, key, value, key_mask, scale, sink):  # type: ignore[no-untyped-def]
        return masked_attention(query, key, value, key_mask, scale=scale, sink=int(sink))

    def write_massive(hidden, prefix_tokens):  # type: ignore[no-untyped-def]
        return massive(hidden, prefix_tokens=prefix_tokens)

    def write_artifact(query, key, scale, prefix_tokens):  # type: ignore[no-untyped-def]
        return artifact(query, key, scale=scale, prefix_tokens=prefix_tokens)

    def write_gelu(self, approximate="none"):  # type: ignore[no-untyped-def]
        """In the order of operations that ONNX Runtime and TensorRT fuse; the exporter's own order they leave in pieces."""
        op = opset18
        if approximate == "tanh":
            cubic = op.Mul(self, op.Mul(self, op.Mul(self, op.CastLike(0.044715, self))))
            inner = op.Tanh(op.Mul(op.Add(self, cubic), op.CastLike(math.sqrt(2 / math.pi), self)))
        else:
            inner = op.Erf(op.Div(self, op.CastLike(math.sqrt(2), self)))
        return op.Mul(op.Mul(self, op.Add(inner, op.CastLike(1.0, self))), op.CastLike(0.5, self))

    def write_farthest(features, num_landmarks):  # type: ignore[no-untyped-def]
        return farthest(features, num_landmarks=num_landmarks, **PLUGIN_FIELDS)

    def write_norm_grid(features, num_landmarks, prefix_tokens):  # type: ignore[no-untyped-def]
        return norm_grid(features, num_landmarks=num_landmarks, prefix_tokens=prefix_tokens)

    operators = torch.ops.fna
    all_samplers()  # registers their operators
    return {
        torch.ops.aten.gelu.default: write_gelu,
        operators.attention.default: write_attention,
        operators.attention_with_key_mask.default: write_attention_with_mask,
        operators.masked_attention.default: write_masked_attention,
        operators.massive_tokens.default: write_massive,
        operators.artifact_tokens.default: write_artifact,
        operators.farthest_point_sampling.default: write_farthest,
        operators.norm_grid_landmarks.default: write_norm_grid,
        **_guided_translations(opset),
    }


def _guided_translations(opset: values.Opset) -> dict[Callable[..., Any], Callable[..., Any]]:
    roles, norm_roles, grid, guided, picked = (
        values.Op(opset, name, operator_schema(name))
        for name in (LANDMARK_ROLES, LARGEST_NORM_ROLES, GUIDED_GRID, GUIDED_FEATURES, GUIDED_PICKS)
    )

    def write_roles(include, exclude, num_landmarks, prefix_tokens):  # type: ignore[no-untyped-def]
        include = opset18.Sub(exclude, exclude) if include is None else include
        exclude = opset18.Sub(include, include) if exclude is None else exclude
        return roles(include, exclude, num_landmarks=num_landmarks, prefix_tokens=prefix_tokens)

    def write_norm_roles(features, role, num_landmarks, prefix_tokens):  # type: ignore[no-untyped-def]
        return norm_roles(features, role, num_landmarks=num_landmarks, prefix_tokens=prefix_tokens)

    def write_grid(role, num_landmarks, prefix_tokens, middles):  # type: ignore[no-untyped-def]
        return grid(role, num_landmarks=num_landmarks, prefix_tokens=prefix_tokens, middles=int(middles))

    def write_features(features, role):  # type: ignore[no-untyped-def]
        return guided(features, role)

    def write_picks(role, picks):  # type: ignore[no-untyped-def]
        return picked(role, picks, num_landmarks=int(picks.shape[1]))

    operators = torch.ops.fna
    return {
        operators.landmark_roles.default: write_roles,
        operators.largest_norm_roles.default: write_norm_roles,
        operators.guided_grid.default: write_grid,
        operators.guided_features.default: write_features,
        operators.guided_picks.default: write_picks,
    }


def _zero_bias(landmarks: Any) -> Any:
    return opset18.Constant(value=onnx.numpy_helper.from_array(torch.zeros(1, int(landmarks.shape[1])).numpy()))


def _name_nodes(model: ModelProto, blocks: Sequence[AttentionBlock]) -> None:
    """Give every `fna` node a name that holds its block's number, told from the module that the exporter saw it in.

    What chooses landmarks or finds tokens is named after the block whose attention comes next.
    """
    numbers = {block.name: block.number for block in blocks}
    nodes = list(fna_nodes(model.graph))
    current = 0
    for node in reversed(nodes):
        if node.op_type in (ATTENTION, MASKED_ATTENTION):
            current = _number_of(node, numbers)
        node.name = f"/blocks.{current}/{node.op_type}"


def _number_of(node: NodeProto, numbers: dict[str, int]) -> int:
    noted = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    found = [numbers[scope] for scope in ast.literal_eval(noted) if scope in numbers]
    if len(found) != 1:
        raise ModelSourceError(
            f"node {node.name!r} of the trace is in {len(found)} attention modules ({noted}), but one is needed to number it; "
            "report the model that this happens with"
        )
    return found[0]


def _drop_stack_traces(model: ModelProto) -> None:
    """The exporter notes in every node where in the Python files of this machine it came from: nobody else's business."""
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        kept = [entry for entry in node.metadata_props if entry.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def _check_landmark_counts(plan: Plan, num_tokens: int, prefix_tokens: int) -> None:
    for entry in plan.blocks:
        if entry.landmarks > num_tokens:
            raise InvalidLandmarksError(
                f"block {entry.block} is planned with {entry.landmarks} landmarks, but at this resolution there are only "
                f"{num_tokens} tokens; ask for at most that many, or a higher resolution"
            )
        check_rooms(
            LandmarkRequest(num_tokens, entry.landmarks, prefix_tokens),
            entry.sampler,
            includes=plan.find_landmark_range("include", entry.block) is not None,
            excludes=plan.find_landmark_range("exclude", entry.block) is not None,
            name=f"block {entry.block}",
        )


@contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Keep the exporter's progress and deprecation notes out of the user's terminal; errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch.fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
