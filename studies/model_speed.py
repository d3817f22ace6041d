"""Whole models on this machine's onnxruntime, plans against the fastest exact form: `python -m studies.model_speed PLAN...`.

Exact attention is timed in each form that onnxruntime has, a plan in the form that onnxruntime is given (docs/engines.md), all taking
turns in one process, batch 1, fp32: three runs a turn, as of one camera's frames, after one that does not count. A PLAN is as
`studies.outside_photographs` has it. With --processor the time is the process's own, with one thread: it can be had beside other
work, which a clock cannot. With --files the exported files are kept in a folder and found there again, so that they can be made
before the machine is quiet; --turns 0 only makes them. Milliseconds, median (fastest to slowest).
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fna.engines.lowerings import processor_form
from fna.export.passes import EXACT_FORMS
from fna.export.passes.lower import lower
from fna.export.sources.loading import load_model
from fna.export.trace import INPUT_NAME, TraceOptions, export_onnx
from fna.files import load_onnx
from fna.plan import uniform_plan
from fna.runtime import open_session
from fna.validate.planning.subject import TorchSubject
from studies.outside_photographs import read_plan

RUNS = 3
"""Of a turn, after the first, which finds the caches as another model left them."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*")
    parser.add_argument("--model", default="dinov2-small-saliency")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--files", type=Path, help="folder that keeps the exported files")
    parser.add_argument("--processor", action="store_true", help="processor time of one thread")
    arguments = parser.parse_args()
    side = arguments.resolution
    clock = time.process_time if arguments.processor else time.perf_counter
    subject = TorchSubject(load_model(arguments.model), side, side)
    plans = {"exact": uniform_plan(subject.layout.num_blocks, layers="none")}
    plans |= {text: read_plan(text, subject) for text in arguments.plans}
    own = processor_form()
    sessions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for text, plan in plans.items():
            path = (arguments.files or Path(folder)) / f"{side}-{re.sub('[^a-z0-9]+', '-', text)}.onnx"
            if not path.is_file():
                export_onnx(subject.model, plan, TraceOptions(side, side, batch=1), path)
            if not arguments.turns:
                continue
            for lowering in EXACT_FORMS if text == "exact" else (own.lowering,):
                threads = 1 if arguments.processor else 0
                model = lower(load_onnx(path), lowering)
                session = open_session(model, name=text, threads=threads, operators=own.library)
                sessions[f"exact, {EXACT_FORMS[lowering]}" if text == "exact" else text] = session
    if not arguments.turns:
        return
    pixels = {INPUT_NAME: np.random.default_rng(0).standard_normal((1, 3, side, side)).astype(np.float32)}
    outputs = {name: session.run(None, pixels)[0] for name, session in sessions.items()}
    forms = [name for name in sessions if name.startswith("exact, ")]
    for name in forms[1:]:
        np.testing.assert_allclose(outputs[name], outputs[forms[0]], atol=2e-3)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(arguments.turns):
        for name, session in sessions.items():
            session.run(None, pixels)
            for _ in range(RUNS):
                start = clock()
                session.run(None, pixels)
                times[name].append(1e3 * (clock() - start))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    baseline = min(forms, key=medians.__getitem__)
    for name, taken in times.items():
        speed = medians[baseline] / medians[name]
        print(f"{name}: {medians[name]:.0f} ms ({min(taken):.0f} to {max(taken):.0f}), {speed:.2f} times {baseline}")


if __name__ == "__main__":
    main()
