"""From a file to the chain of models that its error budget compares, each differing from the one before in one thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from fna.engines.bundle.format import Bundle, is_bundle, open_bundle
from fna.engines.lowerings import processor_form
from fna.engines.manifest import Manifest, read_manifest
from fna.errors import InputFileError, InvalidArgumentError, MissingCapabilityError
from fna.export.metadata import FileMetadata, read_metadata
from fna.export.operators.registry import fna_nodes
from fna.export.passes.lower import lower
from fna.export.passes.processor_kernels import PROCESSOR_DOMAIN
from fna.export.sources.loading import LoadedModel, check_resolution, load_model
from fna.export.sources.running import patched, run_torch
from fna.export.trace import TraceOptions, trace_model
from fna.export.types import PRECISION_OF, tensor_types
from fna.files import file_sha256, load_onnx
from fna.runtime import Arrays
from fna.validate.budget.fna_nodes import list_fna_nodes
from fna.validate.budget.rounding import has_low_types, round_everywhere
from fna.validate.budget.runners import OnnxRunner, Run, with_functions
from fna.validate.budget.undoing import undo_nodes

Say = Callable[..., None]
"""Called with what is being done, and where it is known with how much of it is done and how much there is."""

EXACT, FNA, PORTABLE, DEPLOYED, ENGINE = "exact", "fna", "portable", "deployed", "engine"
PLUGIN = "plugin"
"""The file with the real plugin library in its FNA nodes, emulated. It stands beside the chain, not in it: nothing follows from it."""

PROCESSOR = "processor"
"""The file as `fna run` has it on this machine's processor, with this project's own kernels. It stands beside the chain, too."""

EMULATED_IMAGES = 1
"""An emulated image takes minutes."""

UNDONE = "undone"
"""A grafted file with exact attention in the place of its FNA nodes: what the original is, if the graft took it apart rightly."""


class RunningEngine(Protocol):
    """An engine that can be run and looked into; `fna.engines.run.engine.Engine` is one."""

    manifest: Manifest

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the outputs by name."""

    def inspect(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the debug tensors by name, in the order in which they were written."""


@dataclass(frozen=True)
class ValidatedFile:
    """What `fna validate` was given.

    Attributes:
        path: as the user named it.
        kind: what it is.
        onnx: the ONNX file that is validated, or that the engine was built from.
        engine: the engine, if it is one.
        metadata: of the ONNX file.
        original: for grafted files, the file that was grafted.
        bundle: the bundle, which keeps an unpacked archive in place.
    """

    path: Path
    kind: str
    onnx: Path
    engine: Path | None
    metadata: FileMetadata
    original: Path | None
    bundle: Bundle | None = None

    @property
    def precision(self) -> str:
        """What the file computes in: int8 where its linear layers do, else the type of weights and activations."""
        return self.metadata.quantized or self.metadata.precision


@dataclass(frozen=True)
class Comparison:
    """One step of the budget: what is compared with what.

    Attributes:
        step: its name.
        compares: in words.
        reference: the stage that is taken as right; see the constants above.
        actual: the stage that is compared with it.
        not_measured: why it cannot be measured, or None.
    """

    step: str
    compares: str
    reference: str
    actual: str
    not_measured: str | None = None


@dataclass
class Chain:
    """The models to be run, by stage, and the steps between them.

    Attributes:
        file: what is validated.
        model: the PyTorch model; None for grafted files.
        height: of the images, in pixels.
        width: of the images, in pixels.
        outputs: names of the outputs that are compared.
        stages: how each stage is run.
        comparisons: the steps, in order.
        proto: the deployed file's model, tensors loaded.
        portable: the fp32 model of the export step, if it is not the deployed file.
        reference: a grafted file's original.
        engine: the engine, where this machine can run it.
        notes: what the reader should know about how something was run.
    """

    file: ValidatedFile
    model: LoadedModel | None
    height: int
    width: int
    outputs: tuple[str, ...]
    proto: ModelProto
    stages: dict[str, Run] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    portable: ModelProto | None = None
    reference: ModelProto | None = None
    engine: RunningEngine | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def metadata(self) -> FileMetadata:
        """The file's metadata."""
        return self.file.metadata

    @property
    def folder(self) -> Path:
        """Where the ONNX file's external data lies."""
        return self.file.onnx.parent


def open_validated_file(path: Path, original: Path | None = None) -> ValidatedFile:
    """Find out what a path is: an ONNX file, an engine with its ONNX file beside it, or a bundle.

    Args:
        path: the file or folder.
        original: for grafted files, the file that was grafted; None looks beside the file for the name that it keeps.

    Raises:
        InputFileError: if it is none of these, is damaged, or the original is not there or is another file.
    """
    kind, engine, onnx_path, bundle = "onnx", None, path, None
    if is_bundle(path) or path.is_dir():
        bundle = open_bundle(path)
        kind, onnx_path = "bundle", bundle.model("portable")
    elif path.suffix == ".engine":
        kind, engine, onnx_path = "engine", path, _onnx_of_engine(path)
    metadata = read_metadata(load_onnx(onnx_path, tensors=False), str(onnx_path))
    if metadata.origin == "graft":
        original = _find_original(onnx_path, metadata, original)
    elif original is not None:
        raise InvalidArgumentError(
            f"--original {original} was given, but {onnx_path.name} was traced from {metadata.source}, which it is compared "
            "with; leave --original out"
        )
    return ValidatedFile(path, kind, onnx_path, engine, metadata, original, bundle)


def _onnx_of_engine(engine: Path) -> Path:
    manifest = read_manifest(engine)
    path = engine.parent / manifest.onnx_name
    if not path.is_file():
        raise InputFileError(
            f"{engine.name} was built from {manifest.onnx_name}, which is not beside it; put it there to validate"
        )
    if file_sha256(path) != manifest.onnx_sha256:
        raise InputFileError(
            f"{path} is not the file that {engine.name} was built from (its SHA-256 differs); build the engine again"
        )
    return path


def _find_original(path: Path, metadata: FileMetadata, named: Path | None) -> Path:
    places = [named] if named is not None else [path.parent / metadata.source, Path(metadata.source)]
    original = next((place for place in places if place.is_file()), None)
    if original is None:
        missing = f"{named} does not exist" if named is not None else f"{metadata.source} is not beside it"
        raise InputFileError(
            f"{path.name} was grafted from {metadata.source} and is compared with it, but {missing}; "
            "give the original as --original FILE"
        )
    digest = file_sha256(original)
    if metadata.original_sha256 is not None and digest != metadata.original_sha256:
        raise InputFileError(
            f"{original} is not the file that {path.name} was grafted from: its SHA-256 begins with {digest[:12]}, but "
            f"{metadata.original_sha256[:12]} is needed; give the original as --original FILE"
        )
    return original


def open_chain(
    file: ValidatedFile, resolution: tuple[int, int] | None, say: Say, emulation: ProcessPoolExecutor | None = None
) -> Chain:
    """Load every model of the chain.

    Args:
        file: what is validated.
        resolution: of the images, where the file leaves it open.
        say: called with what is being done.
        emulation: the plugin library in the PTX machine, for a step of its own; see `fna.plugins.ptx.emulated_plugin`.

    Raises:
        InputFileError: if a file cannot be run, or has other inputs or outputs than its model.
        ModelSourceError: if the model cannot be loaded from its metadata.
    """
    chain = _open_traced(file, resolution, say) if file.original is None else _open_grafted(file, resolution, say)
    reference = DEPLOYED if DEPLOYED in chain.stages else PORTABLE
    if file.kind == "onnx":
        _add_processor(chain, reference, say)
    if emulation is not None:
        _add_plugin(chain, reference, emulation, say)
    if file.engine is not None:
        say("opening the engine")
        compares = "engine against the ONNX file" if reference == DEPLOYED else "engine against the fp32 ONNX file"
        try:
            engine = _open_engine(file.engine)
        except MissingCapabilityError as error:
            chain.comparisons.append(Comparison("engine", compares, reference, ENGINE, str(error)))
        else:
            (name,) = engine.manifest.profiles
            chain.engine = engine
            chain.stages[ENGINE] = lambda pixels: engine.run({name: pixels})
            chain.comparisons.append(Comparison("engine", compares, reference, ENGINE))
    return chain


def _add_processor(chain: Chain, reference: str, say: Say) -> None:
    form = processor_form()
    if form.library is None or not any(True for _ in fna_nodes(chain.proto.graph)):
        return
    lowered = lower(chain.proto, form.lowering)
    if not any(node.domain == PROCESSOR_DOMAIN for node in lowered.graph.node):
        return
    say("opening it with this processor's kernels")
    name = f"{chain.file.onnx.name} with this processor's kernels"
    chain.stages[PROCESSOR] = OnnxRunner(lowered, chain.folder, name, operators=form.library).run
    compares = "the file as fna run has it here, with kernels for the processor, against the ONNX file"
    chain.comparisons.append(Comparison(PROCESSOR, compares, reference, PROCESSOR))


def _add_plugin(chain: Chain, reference: str, emulation: ProcessPoolExecutor, say: Say) -> None:
    from fna.validate.budget.emulated import EmulatedFile

    say("cutting the file at its FNA nodes")
    emulated = EmulatedFile(chain.proto, chain.folder, chain.file.onnx.name, emulation, say)
    chain.stages[PLUGIN] = emulated.run
    compares = "the file with its FNA nodes in the plugin library, kernels emulated, against the ONNX file"
    chain.comparisons.append(Comparison(PLUGIN, compares, reference, PLUGIN))
    chain.notes.append(
        f"the plugin step: {len(emulated.nodes)} nodes, on the first {EMULATED_IMAGES} of the photographs"
    )


def _open_traced(file: ValidatedFile, resolution: tuple[int, int] | None, say: Say) -> Chain:
    metadata = file.metadata
    say("loading the model")
    model = load_model(metadata.source)
    size = choose_size(metadata, resolution, model.native_size)
    check_resolution(model, *size)
    proto, runnable = _load_with_functions(file.onnx)
    chain = Chain(file, model, *size, model.output_names, proto)
    chain.stages[EXACT] = lambda pixels: run_torch(model, pixels)

    def run_patched(pixels: NDArray[np.float32]) -> Arrays:
        with patched(model, metadata.plan):
            return run_torch(model, pixels)

    chain.stages[FNA] = run_patched
    chain.comparisons.append(Comparison("approximation", "FNA against exact attention, PyTorch fp32", EXACT, FNA))
    say("opening the ONNX file on onnxruntime")
    name = file.onnx.name
    if file.precision == "fp32":
        chain.stages[PORTABLE] = _checked(OnnxRunner(runnable, chain.folder, name), chain, name).run
    else:
        say("exporting the model in fp32 for comparison")
        chain.portable, _ = trace_model(model, metadata.plan, TraceOptions(*size))
        chain.stages[PORTABLE] = OnnxRunner(chain.portable, chain.folder, "the fp32 export").run
    chain.comparisons.append(
        Comparison("export", "ONNX (fp32, onnxruntime) against FNA in PyTorch fp32", FNA, PORTABLE)
    )
    _add_precision(chain, PORTABLE, say)
    return chain


def _open_grafted(file: ValidatedFile, resolution: tuple[int, int] | None, say: Say) -> Chain:
    assert file.original is not None
    metadata = file.metadata
    say("opening the original")
    original = load_onnx(file.original)
    proto, runnable = _load_with_functions(file.onnx)
    names = {output.name for output in original.graph.output}
    outputs = tuple(output.name for output in proto.graph.output if output.name in names)
    runner = OnnxRunner(file.original, file.original.parent, file.original.name)
    fixed = (runner.height, runner.width) if runner.height and runner.width else (metadata.height, metadata.width)
    size = choose_size(metadata.model_copy(update={"height": fixed[0], "width": fixed[1]}), resolution, None)
    chain = Chain(file, None, *size, outputs, proto, reference=original)
    chain.stages[EXACT] = runner.run
    say("opening the grafted file")
    name = file.onnx.name
    chain.stages[FNA] = _checked(OnnxRunner(runnable, chain.folder, name), chain, name).run
    chain.comparisons.append(
        Comparison("approximation", f"grafted file against {file.original.name}, onnxruntime", EXACT, FNA)
    )
    nodes = "each FNA node against FNA in PyTorch fp32 on the node's own inputs"
    if file.precision == "fp32":
        undone = undo_nodes(proto, [node.block for node in list_fna_nodes(proto)], keep_masks=False)
        chain.stages[UNDONE] = OnnxRunner(undone, chain.folder, name).run
        how = f"with exact attention in its nodes, the file against {file.original.name}"
        chain.comparisons.append(Comparison("export", f"{how}; {nodes}", EXACT, UNDONE))
    else:
        chain.comparisons.append(Comparison("export", nodes, FNA, FNA))
    _add_precision(chain, FNA, say)
    return chain


def _load_with_functions(path: Path) -> tuple[ModelProto, ModelProto | Path]:
    """Return a file's model, and what onnxruntime is to open: the file itself where it runs as it is."""
    proto = load_onnx(path)
    count = len(proto.functions)
    proto = with_functions(proto)
    return proto, path if len(proto.functions) == count else proto


def _add_precision(chain: Chain, reference: str, say: Say) -> None:
    """Add the file itself where it is not fp32: rounded to its types, as a GPU would, not as onnxruntime's CPU provider does."""
    precision = chain.file.precision
    if precision == "fp32":
        chain.stages.setdefault(DEPLOYED, chain.stages[reference])
        return
    say(f"opening the {precision} file")
    name = chain.file.onnx.name
    low = has_low_types(chain.proto)
    how = f"every tensor rounded to {chain.metadata.precision}" if low else "onnxruntime"
    compares = f"the {precision} file ({how}) against fp32"
    try:
        deployed = round_everywhere(chain.proto) if low else chain.proto
        chain.stages[DEPLOYED] = _checked(OnnxRunner(deployed, chain.folder, name), chain, name).run
    except InputFileError as error:
        chain.comparisons.append(Comparison("precision", compares, reference, DEPLOYED, str(error)))
        return
    if low:
        chain.notes.append(
            f"onnxruntime's CPU provider computes {chain.metadata.precision} files in fp32 and hides overflow; here every operator "
            f"computes in fp32 and every tensor is rounded to the type that the file declares"
        )
    chain.comparisons.append(Comparison("precision", compares, reference, DEPLOYED))


def _checked(runner: OnnxRunner, chain: Chain, name: str) -> OnnxRunner:
    """Refuse a file whose input or outputs are not those of the model that it is compared with."""
    for side, taken, needed in (("height", runner.height, chain.height), ("width", runner.width, chain.width)):
        if taken is not None and taken != needed:
            raise InputFileError(
                f"{name} takes images of {side} {taken}, but its metadata says {needed}; export it again"
            )
    missing = [output for output in chain.outputs if output not in runner.outputs]
    if missing:
        raise InputFileError(
            f"{name} has outputs {', '.join(runner.outputs)}, but its model gives {', '.join(chain.outputs)}; "
            "validate the file as fna export wrote it"
        )
    return runner


def _open_engine(path: Path) -> RunningEngine:
    from fna.engines.run.engine import Engine

    return Engine(path)


def inspect_engine(engine: RunningEngine, pixels: NDArray[np.float32]) -> Arrays:
    """Run one image `[1, 3, H, W]` through an engine and return its debug tensors by name, in the order of their writing."""
    (name,) = engine.manifest.profiles
    return engine.inspect({name: pixels})


def choose_size(
    metadata: FileMetadata, resolution: tuple[int, int] | None, native: tuple[int, int] | None
) -> tuple[int, int]:
    """Return height and width: the file's, else `resolution`, else the model's own.

    Raises:
        InputFileError: if they contradict each other, or nothing says them.
    """
    size = (metadata.height, metadata.width)
    if size[0] is not None and size[1] is not None:
        if resolution is not None and resolution != size:
            raise InputFileError(
                f"the file takes {size[0]}x{size[1]} images, but --resolution asks for {resolution[0]}x{resolution[1]}"
            )
        return size[0], size[1]
    chosen = resolution or native
    if chosen is None:
        raise InputFileError("the file leaves its image size open; say which, as in --resolution 518")
    return chosen


def describe_types(model: ModelProto) -> Mapping[str, str]:
    """Return the element type that each FNA node of a file takes, by block number: what it says, not what was asked for."""
    nodes = list_fna_nodes(model)
    if not nodes:
        return {}
    types = tensor_types(model)
    return {str(node.block): PRECISION_OF.get(types.get(node.inputs["query"], 0), "unknown") for node in nodes}
