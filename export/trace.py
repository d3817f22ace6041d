"""Tracing a PyTorch model to an ONNX file in which the chosen blocks are `fna` nodes."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxscript
import onnxscript.optimizer
import torch
from onnx import ModelProto, NodeProto, TensorProto
from onnxscript import opset18
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from fna.block_steps import steps_of
from fna.errors import InvalidArgumentError, InvalidLandmarksError, ModelSourceError, first_line
from fna.export.blocks import module_scopes, traced_node_name
from fna.export.metadata import FileMetadata, write_metadata
from fna.export.operators.builder import HIGHEST_OPSET
from fna.export.operators.registry import attach_functions, fna_nodes, is_attention, translation_table
from fna.export.passes.fold_resizes import fold_constant_resizes
from fna.export.passes.fold_scales import fold_channel_scales
from fna.export.sources.loading import LoadedModel, check_resolution
from fna.export.types import ONNX_TYPES
from fna.files import save_model
from fna.machine import tool_versions
from fna.patching import AttentionBlock, find_attention_blocks, patch, unpatch
from fna.plan import Plan
from fna.precision import Precision
from fna.quiet import quiet_loggers
from fna.samplers import DEFAULT_SAMPLER, find_sampler

TORCH_TYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INPUT_NAME = "pixel_values"


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
            f"trace it at one size, such as {model.native_size[0]}x{model.native_size[1]}"
        )
    blocks = find_attention_blocks(model.module)
    prefix = plan.prefix_tokens if plan.prefix_tokens is not None else blocks[0].prefix_tokens
    plan.check_fits(model.name, None if options.dynamic_size else (options.height, options.width))
    if not plan.towers:  # each tower has its own prefix tokens and patches
        plan = plan.model_copy(update={"prefix_tokens": prefix})
    if plan.needs_positions and options.dynamic_size:
        raise InvalidArgumentError(
            "the plan depends on where on the image a token is (its landmarks, corrections or focal blocks), so height and width "
            f"cannot be left open; use {DEFAULT_SAMPLER} landmarks without corrections"
        )
    if plan.needs_positions and plan.patches is None and not plan.towers:
        patches = (options.height // model.patch_size, options.width // model.patch_size)
        plan = plan.model_copy(update={"patches": patches})
    fixed = next((block.sampler for block in plan.blocks if not find_sampler(block.sampler).takes_open_size), None)
    if options.dynamic_size and fixed is not None:
        raise InvalidArgumentError(
            f"the {fixed} sampler chooses its tokens at export time, so height and width cannot be left open; use {DEFAULT_SAMPLER}"
        )
    if not plan.towers and blocks[0].frames == 1:
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
    if options.precision == "fp32":
        fold_constant_resizes(program)
    attach_functions(
        program, ONNX_TYPES[options.precision] if plan.replaced_blocks or plan.masks else TensorProto.UNDEFINED
    )
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
        tools=tool_versions("torch", "onnx", "onnxscript"),
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
        height, width = (side + extra * model.patch_size for side, extra in zip(model.native_size, (1, 2), strict=True))
    sample = torch.zeros(batch, *model.input_shape(height, width), dtype=dtype)
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
                custom_translation_table=_translations(),
                # The exporter's own optimiser folds batch norms into bf16 convolutions as fp32 weights, which no checker passes.
                optimize=options.precision != "bf16",
                verbose=False,
            )
    except Exception as error:  # the exporter wraps failures of many kinds
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelSourceError(f"tracing {model.name} to ONNX failed: {_describe_failure(cause)}") from error
    if program is None:
        raise ModelSourceError(f"tracing {model.name} to ONNX failed: the exporter returned nothing")
    first = program.model_proto.graph.input[0].type.tensor_type.shape.dim[0]
    if options.batch is None and not first.dim_param:
        raise ModelSourceError(
            f"{model.name} works its batch size into its graph, so it cannot be left open; ask for one, as in --batch 1"
        )
    if options.precision == "bf16":
        onnxscript.optimizer.fold_constants(program.model)
    return program.model_proto


def _describe_failure(cause: BaseException) -> str:
    if not isinstance(cause, GuardOnDataDependentSymNode):
        return first_line(cause)
    lines = re.findall(r'File "(?:[^"]*/)?([^"/]+)", line (\d+), in \w+\n\s*(.+)', str(cause))
    where = f" ({lines[-1][0]}, line {lines[-1][1]}: {lines[-1][2].strip()})" if lines else ""
    return f"it chooses what to do by the values of a tensor{where}, which a file cannot; have it compute without that"


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    return {torch.ops.aten.gelu.default: _write_gelu, **translation_table()}


def _write_gelu(self, approximate="none"):  # type: ignore[no-untyped-def]
    """In the order of operations that ONNX Runtime and TensorRT fuse; the exporter's own order they leave in pieces."""
    op = opset18
    if approximate == "tanh":
        cubic = op.Mul(self, op.Mul(self, op.Mul(self, op.CastLike(0.044715, self))))
        inner = op.Tanh(op.Mul(op.Add(self, cubic), op.CastLike(math.sqrt(2 / math.pi), self)))
    else:
        inner = op.Erf(op.Div(self, op.CastLike(math.sqrt(2), self)))
    return op.Mul(op.Mul(self, op.Add(inner, op.CastLike(1.0, self))), op.CastLike(0.5, self))


def _name_nodes(model: ModelProto, blocks: Sequence[AttentionBlock]) -> None:
    """Give every `fna` node a name that holds its block's number, told from the module that the exporter saw it in.

    What chooses landmarks or finds tokens is named after the block whose attention comes next.
    """
    numbers = {block.name: block.number for block in blocks}
    nodes = list(fna_nodes(model.graph))
    current = 0
    for node in reversed(nodes):
        if is_attention(node.domain, node.op_type):
            current = _number_of(node, numbers)
        node.name = traced_node_name(current, node.op_type)


def _number_of(node: NodeProto, numbers: dict[str, int]) -> int:
    scopes = module_scopes(node)
    blocks = [numbers[scope] for scope in scopes if scope in numbers]
    if len(blocks) != 1:
        raise ModelSourceError(
            f"node {node.name!r} of the trace is in {len(blocks)} attention modules ({scopes}), but one is needed to number it; "
            "report the model that this happens with"
        )
    return blocks[0]


def _drop_stack_traces(model: ModelProto) -> None:
    """The exporter notes in every node where in the Python files of this machine it came from: nobody else's business."""
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        kept = [noted for noted in node.metadata_props if noted.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


def _check_landmark_counts(plan: Plan, num_tokens: int, prefix_tokens: int) -> None:
    for block in plan.blocks:
        if block.landmarks > num_tokens:
            raise InvalidLandmarksError(
                f"block {block.block} is planned with {block.landmarks} landmarks, but at this resolution there are only "
                f"{num_tokens} tokens; ask for at most that many, or a higher resolution"
            )
        step = steps_of(plan, block.block).nystrom
        assert step is not None
        step.landmarks.check_rooms(num_tokens, prefix_tokens, f"block {block.block}")


@contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """Keep the exporter's progress and deprecation notes out of the user's terminal; errors still raise."""
    with (
        quiet_loggers("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch.fx"),
        warnings.catch_warnings(),
        # it prints whole graphs where a model cannot be traced
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
