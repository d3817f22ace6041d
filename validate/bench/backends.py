"""What runs the models of `fna bench`."""

from __future__ import annotations

import copy
import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fna.engines.lowerings import processor_form
from fna.errors import MissingCapabilityError
from fna.export.passes import EXACT_FORMS, KERNEL_FORM, Lowering
from fna.export.passes.lower import lower
from fna.export.sources.loading import LoadedModel
from fna.export.trace import INPUT_NAME, TORCH_TYPES, TraceOptions, export_onnx
from fna.files import load_onnx, save_model
from fna.patching import patch
from fna.plan import Plan
from fna.precision import Precision
from fna.runtime import open_session, run_session
from fna.validate.bench import Backend
from fna.validate.bench.timing import OpenModel, clocked, peak_memory


@dataclass(frozen=True)
class Setting:
    """What is timed, apart from the plan: images of a size (height, width) in pixels, files in `folder`."""

    model: LoadedModel
    size: tuple[int, int]
    batch: int
    precision: Precision
    folder: Path
    launches: int

    @property
    def pixels(self) -> NDArray[np.float32]:  # [B, 3, H, W], or [B, frames, 3, H, W]
        """Images of noise, the same each time."""
        shape = (self.batch, *self.model.input_shape(*self.size))
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def export(self, plan: Plan, precision: Precision) -> Path:
        """Write the ONNX file of one plan, once."""
        digest = hashlib.sha256(f"{plan.model_dump_json()} {precision}".encode()).hexdigest()[:16]
        path = self.folder / f"{digest}-{self.size[0]}x{self.size[1]}.onnx"
        if not path.exists():
            export_onnx(self.model, plan, TraceOptions(*self.size, precision=precision), path)
        return path


@dataclass(frozen=True)
class Form:
    """One way in which a backend computes a model's attention.

    Attributes:
        name: for people; a speed-up names the form of exact attention that it is against.
        lowering: of the ONNX file that is run; None where there is none.
    """

    name: str
    lowering: Lowering | None = None


def forms_of(backend: Backend, model: LoadedModel) -> tuple[Form, ...]:
    """Return the forms of exact attention that a backend offers: the fastest one is the baseline."""
    if backend in ("onnxruntime", "onnxruntime-cuda"):
        own: Lowering = processor_form().lowering if backend == "onnxruntime" else "onnxruntime"
        return tuple(Form(name, own if form == "onnxruntime" else form) for form, name in EXACT_FORMS.items())
    if backend in ("torch", "torch-compile"):
        attention = getattr(getattr(model.module, "config", None), "_attn_implementation", None) or "the model's own"
        return (Form(f"PyTorch, {attention} attention" + (", compiled" if backend == "torch-compile" else "")),)
    from fna.engines.flavours import import_flavour
    from fna.engines.lowerings import find_rule

    lowerings: list[Lowering] = ["portable"]
    if find_rule(backend, import_flavour(backend).__version__).lowering == "fused":  # type: ignore[arg-type]
        lowerings.append("fused")
    return tuple(Form(EXACT_FORMS[lowering], lowering) for lowering in lowerings)


Opener = Callable[[Setting, Plan, Form], OpenModel]


def check_backend(backend: str) -> None:
    """Refuse a backend that this machine lacks, before any work.

    Raises:
        MissingCapabilityError: saying what is missing.
    """
    if backend in ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx"):
        _need_gpu(backend)


def _open_onnxruntime(provider: Literal["cpu", "cuda"]) -> Opener:
    def opener(setting: Setting, plan: Plan, form: Form) -> OpenModel:
        if provider == "cuda":
            _need_gpu("onnxruntime-cuda")
        assert form.lowering is not None
        exported = setting.export(plan, setting.precision)
        path = exported.with_name(f"{exported.stem}-{form.lowering}.onnx")
        save_model(lower(load_onnx(exported), form.lowering), path)
        with peak_memory() as peak:
            library = processor_form().library if form.lowering == KERNEL_FORM else None
            session = open_session(path, provider=provider, operators=library)
            inputs = {INPUT_NAME: setting.pixels}
            run_session(session, inputs)
        return OpenModel(lambda: clocked(lambda: run_session(session, inputs)), peak.mib if provider == "cpu" else None)

    return opener


def _open_torch(setting: Setting, plan: Plan, _form: Form) -> OpenModel:
    return _torch(setting, plan, lambda module: module)


def _open_compiled(setting: Setting, plan: Plan, _form: Form) -> OpenModel:
    def compile_module(module: Any) -> Any:
        torch.compiler.reset()
        return torch.compile(module, dynamic=False)

    try:
        return _torch(setting, plan, compile_module)
    except Exception as error:  # the compiler's own errors are of many kinds; mostly there is no C++ compiler
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingCapabilityError(
            f"torch.compile does not work on this machine: {reason}; use --backend torch"
        ) from error


def _torch(setting: Setting, plan: Plan, prepare: Callable[[Any], Any]) -> OpenModel:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with peak_memory() as peak, torch.inference_mode():
        module = copy.deepcopy(setting.model.module).to(device, TORCH_TYPES[setting.precision])
        if plan.replaced_blocks:
            patch(module, plan)
        ready = prepare(module)
        pixels = torch.from_numpy(setting.pixels).to(device, TORCH_TYPES[setting.precision])
        ready(pixels)
    mib = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak.mib

    def run() -> float:
        with torch.inference_mode():
            return clocked(lambda: _synchronised(ready, pixels, device))

    return OpenModel(run, mib)


def _synchronised(module: Any, pixels: torch.Tensor, device: torch.device) -> None:
    module(pixels)
    if device.type == "cuda":
        torch.cuda.synchronize()


def _open_engine(flavour: Literal["tensorrt", "tensorrt-rtx"]) -> Opener:
    """An engine built for this machine's GPU; each turn is several launches, timed on the device."""

    def opener(setting: Setting, plan: Plan, form: Form) -> OpenModel:
        from fna.engines.builder.build import build_engine
        from fna.engines.builder.options import BatchRange, BuildOptions
        from fna.engines.device import read_gpu
        from fna.engines.flavours import import_flavour
        from fna.engines.run.engine import Engine
        from fna.engines.targets import TARGETS
        from fna.export.variants import FileVariant, make_variant

        _need_gpu(flavour)
        import_flavour(flavour)
        path = setting.export(plan, "fp32")
        if setting.precision != "fp32":
            cast = path.with_name(f"{path.stem}-{setting.precision}.onnx")
            make_variant(path, cast, FileVariant(setting.precision, check=False), [])
            path = cast
        targets = tuple(target for target in TARGETS if read_gpu().capability in target.capabilities)[:1]
        batch = BatchRange(1, setting.batch, setting.batch)
        built = path.with_name(f"{path.stem}-{form.lowering}.engine")
        build_engine(path, built, BuildOptions(flavour, targets, batch, lowering=form.lowering))
        before = _free_device_memory()
        engine = Engine(built)
        inputs = {INPUT_NAME: setting.pixels}
        engine.run(inputs)
        taken = (before - _free_device_memory()) / 2**20
        tails: list[float] = []

        def run() -> float:
            latency = engine.bench(inputs, runs=setting.launches, warm_up=max(2, setting.launches // 5))
            tails.append(latency.p99)
            return latency.median / 1e3

        def details() -> dict[str, float]:
            manifest = engine.manifest
            return {"p99": min(tails), "engine_mib": manifest.engine_bytes / 2**20, "build_seconds": manifest.seconds}

        return OpenModel(run, taken, engine.close, details)

    return opener


def _need_gpu(backend: str) -> None:
    from fna.engines.device import NoGpuError, read_gpu

    try:
        read_gpu()
    except NoGpuError as error:
        raise MissingCapabilityError(
            f"--backend {backend} needs an NVIDIA GPU, but {error}; here are: onnxruntime, torch, torch-compile"
        ) from None


def _free_device_memory() -> int:
    """Bytes of the device that nothing holds."""
    from polygraphy import cuda

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.wrapper().check(cuda.wrapper().handle.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)))
    return free.value


OPENERS: dict[Backend, Opener] = {
    "onnxruntime": _open_onnxruntime("cpu"),
    "onnxruntime-cuda": _open_onnxruntime("cuda"),
    "torch": _open_torch,
    "torch-compile": _open_compiled,
    "tensorrt": _open_engine("tensorrt"),
    "tensorrt-rtx": _open_engine("tensorrt-rtx"),
}
"""How each backend opens the model of a plan in a form."""
