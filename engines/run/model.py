"""An ONNX file or an engine, run on arrays and timed through one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from fna.engines.lowerings import choose_lowering, processor_form
from fna.engines.run.engine import Engine
from fna.engines.run.latency import Latency, seconds_of, summarise
from fna.export.metadata import has_metadata
from fna.export.passes.lower import lower
from fna.files import load_onnx
from fna.runtime import Arrays, Provider, cast_inputs, open_session, run_session


class Model(Protocol):
    """What `open_model` returns: something that runs batches by input name."""

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the outputs by name, on the host."""

    def bench(self, inputs: Arrays, *, runs: int, warm_up: int) -> Latency:
        """Time one batch."""

    def close(self) -> None:
        """Free what it holds."""


class OnnxModel:
    """An ONNX file on onnxruntime."""

    def __init__(self, path: Path, *, provider: Provider = "cpu", threads: int = 0) -> None:
        """Open it in the form that onnxruntime is given; errors are those of `open_session`."""
        import onnxruntime

        model = load_onnx(path, tensors=False)
        library: Path | None = None
        if has_metadata(model) and provider == "cpu":
            form = processor_form()
            model, library = lower(model, form.lowering), form.library
        elif has_metadata(model):
            model = lower(model, choose_lowering("onnxruntime", onnxruntime.__version__))
        self._session = open_session(
            model, name=str(path), folder=path.parent, threads=threads, provider=provider, operators=library
        )
        self._name = path.name
        self._provider = provider

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch and return the outputs by name."""
        return run_session(self._session, inputs, name=self._name)

    def bench(self, inputs: Arrays, *, runs: int = 50, warm_up: int = 5) -> Latency:
        """Time one batch."""
        typed = cast_inputs(self._session, inputs)
        for _ in range(warm_up):
            self.run(typed)
        seconds = [seconds_of(lambda: self.run(typed)) for _ in range(runs)]
        device = "with copies to and from the GPU" if self._provider == "cuda" else "on the processor"
        return summarise(seconds, sum(seconds), typed, measures=f"the call, {device}")

    def close(self) -> None:
        """Free the session."""
        del self._session


def open_model(path: Path, *, provider: Provider = "cpu", plugin: Path | None = None) -> Model:
    """Open an ONNX file, or an engine with its manifest; which it is, its suffix says."""
    return Engine(path, plugin=plugin) if path.suffix == ".engine" else OnnxModel(path, provider=provider)
