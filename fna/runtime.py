"""The one way to open a model in onnxruntime and to run it."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fna.errors import InputFileError, MissingCapabilityError

if TYPE_CHECKING:
    from onnx import ModelProto

Arrays = dict[str, NDArray[Any]]
Provider = Literal["cpu", "cuda"]
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
_SILENT = 4  # onnxruntime's log levels; what goes wrong is raised as well


def open_session(
    model: Path | ModelProto,
    *,
    name: str | None = None,
    folder: Path | None = None,
    provider: Provider = "cpu",
    threads: int = 0,
    optimise: bool = True,
    once: bool = False,
    in_file_order: bool = False,
    weights: Mapping[str, NDArray[Any]] | None = None,
    profile: Path | None = None,
    operators: Path | None = None,
) -> Any:
    """Open a model in onnxruntime.

    Args:
        model: a file, or a model in memory, that runs on standard operators and its own functions.
        name: what errors call it; None is the file's path.
        folder: where external data of a model in memory lies.
        provider: the processor, or the first GPU.
        threads: for one operator; 0 takes all cores.
        optimise: let onnxruntime fuse operators; off where every tensor must be computed as the file says.
        once: the session runs a single time, so weights are not laid out anew for many runs.
        in_file_order: run the operators in the order of the file, as far as that goes.
        weights: values of initializers that a model in memory says lie outside it. They are not copied, and must live as long
            as the session.
        profile: where the times of operators are written, once the session's `end_profiling` is called; what the file's name begins
            with.
        operators: library of operators beyond onnxruntime's own that the model may call.

    Raises:
        InputFileError: if onnxruntime cannot load it; the message has onnxruntime's reason.
        MissingCapabilityError: if this onnxruntime has no such provider, it does not start, or the library does not load.
    """
    import onnxruntime

    wanted = _PROVIDERS[provider]
    if wanted not in onnxruntime.get_available_providers():
        raise MissingCapabilityError(
            f"the onnxruntime installed here has no {wanted}; install it with: pip install 'fna[gpu]', or leave out --provider"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    # Idle sessions otherwise keep a core spinning, which slows whatever else runs in the process and skews comparisons.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if once:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _share_one_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    if in_file_order:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None and not isinstance(model, Path):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    if weights:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    if operators is not None:
        try:
            options.register_custom_ops_library(str(operators))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise MissingCapabilityError(f"{operators} does not load into onnxruntime: {reason}") from None
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        session = onnxruntime.InferenceSession(source, options, providers=[wanted])
    except Exception as error:  # onnxruntime's own exception types share no public base
        shown = name or (model if isinstance(model, Path) else "the model")
        raise InputFileError(f"{shown} cannot be loaded by onnxruntime: {' '.join(str(error).split())}") from None
    if wanted not in session.get_providers():
        raise MissingCapabilityError(
            f"onnxruntime's {wanted} does not start on this machine; it needs a GPU and a driver"
        )
    return session


@cache
def _share_one_arena() -> None:
    """Let sessions that run once take memory from one arena: a third of such a run is else spent on pages that are new to it."""
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(0, -1, -1, -1))


def run_session(
    session: Any,
    inputs: Mapping[str, NDArray[Any]],
    outputs: Sequence[str] | None = None,
    *,
    name: str = "the model",
    longest_s: float | None = None,
) -> Arrays:
    """Run one batch.

    Args:
        session: what `open_session` returned.
        inputs: arrays by name; they are cast to the types that the model declares, and those it does not take are left out.
        outputs: which to compute; None is all of the model's.
        name: what errors call the model.
        longest_s: seconds after which the run is ended; None is never.

    Returns:
        The outputs by name, in the order asked for.

    Raises:
        InputFileError: if the run fails or takes too long; the message has onnxruntime's reason.
    """
    import onnxruntime

    names = list(outputs) if outputs is not None else [value.name for value in session.get_outputs()]
    run_options = onnxruntime.RunOptions()
    timer = threading.Timer(longest_s or 0.0, lambda: setattr(run_options, "terminate", True))
    timer.daemon = True
    if longest_s is not None:
        timer.start()
    try:
        arrays = session.run(names, cast_inputs(session, inputs), run_options)
    except Exception as error:  # likewise
        raise InputFileError(f"{name} does not run on onnxruntime: {' '.join(str(error).split())}") from None
    finally:
        timer.cancel()
    return dict(zip(names, arrays, strict=True))


def cast_inputs(session: Any, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """Return the inputs that a session takes, in the types that it declares."""
    types = {value.name: _NUMPY_TYPES.get(value.type) for value in session.get_inputs()}
    return {
        name: array if types[name] is None else np.ascontiguousarray(array, dtype=types[name])
        for name, array in inputs.items()
        if name in types
    }
