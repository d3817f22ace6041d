"""Writing a Triton Inference Server model repository for an FNA file.

Two ways to the same outputs, each as a model and, in front of it, an ensemble that takes decoded photographs: TensorRT, whose plan is
built on the server by the bundle's `build_engine.sh`, and onnxruntime, which needs no plugin.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fna import __version__
from fna.engines.builder.options import BatchRange
from fna.engines.builder.profiles import input_profiles
from fna.engines.bundle.format import safe_name
from fna.engines.bundle.models import split_weights
from fna.engines.lowerings import choose_lowering
from fna.engines.manifest import ShapeRange
from fna.errors import InputFileError, InvalidArgumentError
from fna.export.metadata import FileMetadata, read_metadata
from fna.export.passes.lower import lower
from fna.export.preprocessing import Preprocessing
from fna.files import file_sha256, load_onnx, part_folder

QUEUE_MICROSECONDS = 1000
"""How long the batcher waits for more requests."""

PREPROCESS_OPSET = 18
"""From which Resize has antialias, as Pillow's filters are."""

PLAN = "model.plan"
SOURCE = "source.sha256"
"""Beside the versions of the TensorRT model: the SHA-256 of the file that its engine has to be built from."""

VERSION = "1"
"""The version that is written; others in a repository are other people's, and stay."""

PORTABLE = "model.onnx"

_OLDEST_ONNXRUNTIME = "1.18"
"""Of the servers that a repository may go to: that of Triton 24.08, the image of `Dockerfile.igpu`."""

_SCRIPTS = Path(__file__).resolve().parent.parent / "bundle" / "scripts"
_DEPLOY = Path(__file__).resolve().parent / "deploy"
_TYPES = {TensorProto.FLOAT: "TYPE_FP32", TensorProto.FLOAT16: "TYPE_FP16", TensorProto.BFLOAT16: "TYPE_BF16"}
_RESIZE = {"bilinear": "linear", "bicubic": "cubic"}  # onnxruntime breaks ties of nearest otherwise than Pillow
_IMAGE = "raw_image"


@dataclass(frozen=True)
class Tensor:
    """A model's input or output as Triton describes it: sides without the batch, -1 where open."""

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class ModelRepository:
    """What was written.

    Attributes:
        models: their names; the first is the one to call.
        left_out: what was not written, and why.
        dropped: what was removed, and why.
    """

    models: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def write_model_repository(
    path: Path,
    output: Path,
    *,
    batch: BatchRange,
    resolution: tuple[int, int] | None = None,
    instances: int = 1,
) -> ModelRepository:
    """Write the model repository of an FNA file into a folder that is empty, not there, or holds an earlier one.

    An engine in an earlier one stays if it was built from the same file. Other versions than `VERSION` always stay.

    Args:
        path: file written by `fna export` or `fna graft`, its batch size open.
        output: the repository.
        batch: batch sizes that the engine takes; the largest is what Triton batches up to.
        resolution: height and width for files that leave them open.
        instances: copies of a model that run at the same time on one GPU.

    Raises:
        InputFileError: if the file cannot be read or the folder holds something else.
        InvalidArgumentError: if the batch sizes leave out 1, or the file's batch size is fixed.
    """
    model = load_onnx(path, tensors=False)
    metadata = read_metadata(model, str(path))
    source, shapes = _image_input(model, metadata, batch, resolution)
    name = safe_name(path.name.removesuffix(".onnx"))
    outputs = [_describe(value) for value in model.graph.output]
    names = {kind: f"{name}_{kind}" for kind in ("tensorrt", "onnxruntime", "preprocess", "portable")}
    left_out = []
    with part_folder(output) as temporary:
        root = temporary / "repository"
        root.mkdir()
        _write_tensorrt(root / names["tensorrt"], source, outputs, batch, instances)
        (root / names["tensorrt"] / SOURCE).write_text(file_sha256(path) + "\n", encoding="ascii")
        variants = {"tensorrt": name}
        if metadata.precision == "bf16":
            left_out.append(
                "the onnxruntime variant: onnxruntime has no bf16 kernels for most of the model's operators"
            )
        else:
            _write_onnxruntime(root / names["onnxruntime"], model, path.parent, source, outputs, batch, instances)
            variants["onnxruntime"] = names["portable"]
        if metadata.preprocessing.resize in _RESIZE:
            _write_preprocess(root / names["preprocess"], metadata.preprocessing, model, source, shapes, batch)
            for kind, ensemble in variants.items():
                _write_ensemble(root / ensemble, names["preprocess"], names[kind], source, outputs, batch)
        else:
            left_out.append(
                f"the ensembles from photographs: ONNX has no operator that resizes as Pillow's {metadata.preprocessing.resize} does"
            )
        models = tuple(sorted(folder.name for folder in root.iterdir()))
        _write_documents(root, name, names, source, batch, left_out)
        dropped = _replace(root, output)
    first = name if name in models else names["tensorrt"]
    return ModelRepository((first, *(other for other in models if other != first)), tuple(left_out), dropped)


def make_preprocess_model(
    preprocessing: Preprocessing, height: int, width: int, output: str, element_type: int = TensorProto.FLOAT
) -> ModelProto:
    """Return an ONNX model that does to decoded photographs what `Preprocessing.apply` does.

    Input `raw_image` `[batch, rows, columns, 3]` uint8, RGB; output `[batch, 3, height, width]`. Pillow resizes the columns, then the
    rows, and rounds to bytes after each, so this does too.

    Args:
        preprocessing: its resize filter is bilinear or bicubic.
        height: of the output, in pixels.
        width: of the output, in pixels.
        output: its name.
        element_type: its ONNX type.

    Raises:
        InvalidArgumentError: for another filter.
    """
    if preprocessing.resize not in _RESIZE:
        raise InvalidArgumentError(
            f"ONNX has no operator that resizes as Pillow's {preprocessing.resize} does; it has {' and '.join(_RESIZE)}"
        )
    constants = {
        "preprocess/columns": np.array([width], np.int64),
        "preprocess/size": np.array([height, width], np.int64),
        "preprocess/rescale": np.array(preprocessing.rescale, np.float32),
        "preprocess/mean": np.array(preprocessing.mean, np.float32).reshape(1, 3, 1, 1),
        "preprocess/std": np.array(preprocessing.std, np.float32).reshape(1, 3, 1, 1),
        "preprocess/half": np.array(0.5, np.float32),
        "preprocess/black": np.array(0, np.float32),
        "preprocess/white": np.array(255, np.float32),
        "preprocess/one": np.array([1], np.int64),
        "preprocess/zeros": np.zeros(5, np.int64),
        "preprocess/zero": np.array([0], np.int64),
        "preprocess/height": np.array([height], np.int64),
        "preprocess/row_axis": np.array([2], np.int64),
    }
    nodes = [
        *_fill_empty(),
        helper.make_node("Transpose", ["preprocess/filled"], ["preprocess/planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["preprocess/planes"], ["preprocess/pixels"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["preprocess/pixels"], ["preprocess/rows_shape"], start=0, end=3),
        helper.make_node("Concat", ["preprocess/rows_shape", "preprocess/columns"], ["preprocess/wide_shape"], axis=0),
        *_resize("preprocess/pixels", "preprocess/wide_shape", "preprocess/wide", preprocessing.resize),
        helper.make_node("Shape", ["preprocess/wide"], ["preprocess/items_shape"], start=0, end=2),
        helper.make_node("Concat", ["preprocess/items_shape", "preprocess/size"], ["preprocess/full_shape"], axis=0),
        *_resize("preprocess/wide", "preprocess/full_shape", "preprocess/resized", preprocessing.resize),
        helper.make_node("Mul", ["preprocess/resized", "preprocess/rescale"], ["preprocess/scaled"]),
        helper.make_node("Sub", ["preprocess/scaled", "preprocess/mean"], ["preprocess/centred"]),
        helper.make_node("Div", ["preprocess/centred", "preprocess/std"], ["preprocess/normalised"]),
        helper.make_node("Cast", ["preprocess/normalised"], ["preprocess/cast"], to=element_type),
        helper.make_node(
            "Slice", ["preprocess/cast", "preprocess/zero", "preprocess/rows", "preprocess/row_axis"], [output]
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "preprocess",
        [helper.make_tensor_value_info(_IMAGE, TensorProto.UINT8, ["batch", "rows", "columns", 3])],
        [helper.make_tensor_value_info(output, element_type, ["batch", 3, "height", width])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", PREPROCESS_OPSET)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def _fill_empty() -> list[onnx.NodeProto]:
    """Make a black pixel of an empty photograph, which no resize takes, and `preprocess/rows` 0 for it: the height for all others.

    The model behind then gets a photograph without rows, which Triton refuses as a wrong shape (400), where an operator that
    fails would be an error of the server's (500).
    """
    return [
        helper.make_node("Shape", [_IMAGE], ["preprocess/sides"], start=1, end=3),
        helper.make_node("Min", ["preprocess/sides", "preprocess/one"], ["preprocess/there"]),
        helper.make_node("Sub", ["preprocess/one", "preprocess/there"], ["preprocess/missing"]),
        helper.make_node(
            "Concat", ["preprocess/zeros", "preprocess/missing", "preprocess/zero"], ["preprocess/pads"], axis=0
        ),
        helper.make_node("Pad", [_IMAGE, "preprocess/pads"], ["preprocess/filled"]),
        helper.make_node("ReduceMin", ["preprocess/there"], ["preprocess/whole"], keepdims=1),
        helper.make_node("Mul", ["preprocess/whole", "preprocess/height"], ["preprocess/rows"]),
    ]


def _resize(source: str, shape: str, result: str, name: str) -> list[onnx.NodeProto]:
    """Resize, then round to bytes as Pillow does: halves up, 0 to 255. cubic_coeff_a and exclude_outside are Pillow's, too."""
    settings = {"mode": _RESIZE[name], "coordinate_transformation_mode": "half_pixel"}
    inputs = [source, "", "", shape]
    return [
        helper.make_node(
            "Resize", inputs, [f"{result}_exact"], antialias=1, cubic_coeff_a=-0.5, exclude_outside=1, **settings
        ),
        helper.make_node("Add", [f"{result}_exact", "preprocess/half"], [f"{result}_up"]),
        helper.make_node("Floor", [f"{result}_up"], [f"{result}_whole"]),
        helper.make_node("Clip", [f"{result}_whole", "preprocess/black", "preprocess/white"], [result]),
    ]


def _image_input(
    model: ModelProto, metadata: FileMetadata, batch: BatchRange, resolution: tuple[int, int] | None
) -> tuple[Tensor, ShapeRange]:
    profiles = input_profiles(model, batch, metadata, resolution)
    ((name, shapes),) = profiles.items()
    (value,) = (value for value in model.graph.input if value.name == name)
    side = value.type.tensor_type.shape.dim[0]
    if side.HasField("dim_value"):
        raise InvalidArgumentError(
            f"the file's batch size is fixed at {side.dim_value}, but Triton batches requests; export it without --batch"
        )
    if batch.smallest != 1:
        raise InvalidArgumentError(
            f"batch {batch.smallest}:{batch.usual}:{batch.largest} leaves out single requests; let it begin with 1"
        )
    return Tensor(name, _TYPES[value.type.tensor_type.elem_type], shapes.usual[1:]), shapes


def _describe(value: onnx.ValueInfoProto) -> Tensor:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES or not tensor.HasField("shape"):
        raise InputFileError(f"output {value.name!r} has no floating-point type and rank, which Triton has to be told")
    sides = tuple(side.dim_value if side.HasField("dim_value") else -1 for side in tensor.shape.dim[1:])
    return Tensor(value.name, _TYPES[tensor.elem_type], sides)


def _write_tensorrt(folder: Path, source: Tensor, outputs: Sequence[Tensor], batch: BatchRange, instances: int) -> None:
    (folder / VERSION).mkdir(parents=True)
    (folder / VERSION / "PUT_MODEL_PLAN_HERE.txt").write_text(
        f"The engine, named {PLAN}: build_engine.sh of the bundle, on the server, with --output. See README.md.\n"
    )
    lines = [
        f'name: "{folder.name}"',
        'platform: "tensorrt_plan"',
        'backend: "tensorrt"',
        f'default_model_filename: "{PLAN}"',
        f"max_batch_size: {batch.largest}",
        *_tensors("input", [source]),
        *_tensors("output", outputs),
        *_batching(batch),
        f"instance_group [ {{ count: {instances} kind: KIND_GPU }} ]",
        *_graphs(source, batch),
        *_warm_up(source, batch),
    ]
    _write_config(folder, lines)


def _write_onnxruntime(
    folder: Path,
    model: ModelProto,
    source_folder: Path,
    source: Tensor,
    outputs: Sequence[Tensor],
    batch: BatchRange,
    instances: int,
) -> None:
    (folder / VERSION).mkdir(parents=True)
    split_weights(model, source_folder, folder / VERSION / "model.weights")
    lowering = choose_lowering("onnxruntime", _OLDEST_ONNXRUNTIME)
    (folder / VERSION / PORTABLE).write_bytes(lower(model, lowering).SerializeToString(deterministic=True))
    lines = [
        f'name: "{folder.name}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{PORTABLE}"',
        f"max_batch_size: {batch.largest}",
        *_tensors("input", [source]),
        *_tensors("output", outputs),
        *_batching(batch),
        f"instance_group [ {{ count: {instances} kind: KIND_AUTO }} ]",
        *_warm_up(source, batch),
    ]
    _write_config(folder, lines)


def _write_preprocess(
    folder: Path, preprocessing: Preprocessing, model: ModelProto, source: Tensor, shapes: ShapeRange, batch: BatchRange
) -> None:
    (folder / VERSION).mkdir(parents=True)
    height, width = shapes.usual[2:]
    (value,) = (value for value in model.graph.input if value.name == source.name)
    made = make_preprocess_model(preprocessing, height, width, source.name, value.type.tensor_type.elem_type)
    (folder / VERSION / PORTABLE).write_bytes(made.SerializeToString(deterministic=True))
    lines = [
        f'name: "{folder.name}"',
        'backend: "onnxruntime"',
        f'default_model_filename: "{PORTABLE}"',
        f"max_batch_size: {batch.largest}",
        *_tensors("input", [Tensor(_IMAGE, "TYPE_UINT8", (-1, -1, 3))]),
        *_tensors("output", [replace(source, dims=(source.dims[0], -1, source.dims[2]))]),
        "instance_group [ { count: 1 kind: KIND_CPU } ]",
    ]
    _write_config(folder, lines)


def _write_ensemble(
    folder: Path, preprocess: str, model: str, source: Tensor, outputs: Sequence[Tensor], batch: BatchRange
) -> None:
    (folder / VERSION).mkdir(parents=True)
    (folder / VERSION / ".keep").touch()  # Triton wants a version folder, and not every copy keeps an empty one
    lines = [
        f'name: "{folder.name}"',
        'platform: "ensemble"',
        f"max_batch_size: {batch.largest}",
        *_tensors("input", [Tensor(_IMAGE, "TYPE_UINT8", (-1, -1, 3))]),
        *_tensors("output", outputs),
        "ensemble_scheduling {",
        *_step(preprocess, [_IMAGE], [source.name]),
        *_step(model, [source.name], [output.name for output in outputs]),
        "}",
    ]
    _write_config(folder, lines)


def _step(model: str, inputs: Sequence[str], outputs: Sequence[str]) -> list[str]:
    maps = [f'    input_map {{ key: "{name}" value: "{name}" }}' for name in inputs]
    maps += [f'    output_map {{ key: "{name}" value: "{name}" }}' for name in outputs]
    return ["  step {", f'    model_name: "{model}"', "    model_version: -1", *maps, "  }"]


def _tensors(kind: str, tensors: Sequence[Tensor]) -> list[str]:
    return [
        f'{kind} {{ name: "{tensor.name}" data_type: {tensor.data_type} dims: [ {", ".join(map(str, tensor.dims))} ] }}'
        for tensor in tensors
    ]


def _batching(batch: BatchRange) -> list[str]:
    """Dynamic batching from the profile: Triton fills a batch up to the size that the engine was tuned for, then to the largest."""
    if batch.largest == 1:
        return []
    preferred = ", ".join(str(size) for size in sorted({batch.usual, batch.largest} - {1}))
    return [
        f"dynamic_batching {{ preferred_batch_size: [ {preferred} ] max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}"
    ]


def _graphs(source: Tensor, batch: BatchRange) -> list[str]:
    """A CUDA graph at each batch size of the profile; other sizes are launched kernel by kernel."""
    dims = ", ".join(map(str, source.dims))
    specs = [
        f'graph_spec {{ batch_size: {size} input {{ key: "{source.name}" value {{ dim: [ {dims} ] }} }} }}'
        for size in _sizes(batch)
    ]
    return [f"optimization {{ cuda {{ graphs: true {' '.join(specs)} }} }}"]


def _sizes(batch: BatchRange) -> list[int]:
    return sorted({batch.smallest, batch.usual, batch.largest})


def _warm_up(source: Tensor, batch: BatchRange) -> list[str]:
    """A run at each batch size of the profile, so that kernels are loaded before the first request."""
    dims = ", ".join(map(str, source.dims))
    return [
        f'model_warmup {{ name: "batch {size}" batch_size: {size} inputs {{ key: "{source.name}" '
        f"value {{ data_type: {source.data_type} dims: [ {dims} ] random_data: true }} }} }}"
        for size in _sizes(batch)
    ]


def _write_config(folder: Path, lines: Sequence[str]) -> None:
    (folder / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_documents(
    root: Path, name: str, names: dict[str, str], source: Tensor, batch: BatchRange, left_out: Sequence[str]
) -> None:
    """Write what a person reads, and what starts a server: Compose, Kubernetes, an image for a Jetson."""
    values = {
        **names,
        "name": name,
        "application": f"triton-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:40]}".rstrip("-"),
        "batch": f"{batch.smallest}:{batch.usual}:{batch.largest}",
        "input": source.name,
        "dims": "x".join(map(str, source.dims)),
        "left_out": "".join(f"\nLeft out: {reason}.\n" for reason in left_out),
        "version": __version__,
    }
    for template, output in ((_SCRIPTS / "TRITON.md", "README.md"), *((path, path.name) for path in _DEPLOY.iterdir())):
        text = re.sub(r"(?<!\$)\{(\w+)\}", lambda match: values[match[1]], template.read_text(encoding="utf-8"))
        (root / output).write_text(text, encoding="utf-8")


def _replace(root: Path, output: Path) -> tuple[str, ...]:
    """Put the repository in place, and return what of an earlier one was dropped, and why."""
    ours = {path.name for path in root.iterdir()}
    if output.exists() and not output.is_dir():
        raise InputFileError(f"{output} cannot be written: it is a file; give a folder")
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if there - ours:
        raise InputFileError(
            f"{output} holds {sorted(there - ours)[0]}, which this repository does not; give an empty folder"
        )
    output.mkdir(exist_ok=True)
    dropped = []
    for part in sorted(root.iterdir()):
        place = output / part.name
        if place.is_dir():
            dropped += _keep(place, part)
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        part.replace(place)
    return tuple(dropped)


def _keep(old: Path, new: Path) -> list[str]:
    """Move what stays of a model into its new folder: other versions, and an engine of the same source."""
    for version in old.iterdir():
        if version.is_dir() and version.name != VERSION:
            version.replace(new / version.name)
    plan = old / VERSION / PLAN
    if not plan.is_file():
        return []
    source = old / SOURCE
    if source.is_file() and source.read_text() == (new / SOURCE).read_text():
        plan.replace(new / VERSION / PLAN)
        return []
    return [f"{new.name}/{VERSION}/{PLAN}: it was built from another file than this; build it again, as README.md says"]
