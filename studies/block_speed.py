"""One block's attention on this machine's onnxruntime, by form: `python -m studies.block_speed --resolution 518`.

Processor time of one thread, which can be had beside other work; the shape is DINOv2-S's: 6 heads of 64. All take turns in one
process: standard operators, focal attention in one piece and in pieces, and this project's kernels (docs/kernels.md), exact attention
by them too, as focal attention of one level. Milliseconds, median (fastest to slowest), and the share of the fastest exact form of
onnxruntime; with --operators also what each of a form's operators takes, by onnxruntime's own profile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from fna.chebyshev import CHEBYSHEV, default_core
from fna.export.passes import KERNEL_FORM
from fna.export.passes.lower import lower
from fna.focal_keys import Levels
from fna.plan import BlockPlan, FocalBlockPlan, Plan
from fna.plugins.processor_library import build_processor_library
from fna.runtime import open_session
from fna.validate.planning.one_block import EXACT_FORMS, exact_block, planned_block
from fna.validate.planning.subject import Layout

FOCAL: dict[str, tuple[int, Levels, int]] = {
    "tiles of 8, cells of 2 from 2": (8, ((1, 0), (2, 2)), 16),
    "tiles of 8, cells of 2 from 2, 4 from 12": (8, ((1, 0), (2, 2), (4, 12)), 32),
    "tiles of 4, cells of 2 from 2, 4 from 4, 8 from 12": (4, ((1, 0), (2, 2), (4, 4), (8, 12)), 16),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--operators", action="store_true", help="what each operator of a form takes")
    arguments = parser.parse_args()
    side = arguments.resolution // 14
    layout = Layout("one block", 1, {}, side * side + 1, 6, 64, 384, 1, (side, side), (arguments.resolution,) * 2)

    def planned(**blocks: object) -> Plan:
        return Plan.model_validate({"num_blocks": 1, "prefix_tokens": 1, "patches": (side, side), **blocks})

    models = {f"exact, {form}": exact_block(layout, form) for form in EXACT_FORMS}
    kernels: dict[str, ModelProto] = {}

    def with_kernel(name: str, model: ModelProto) -> None:
        kernels[f"{name}, kernel"] = lower(model, KERNEL_FORM)

    with_kernel("all keys", planned_block(layout, planned(focal=[FocalBlockPlan(block=0, levels=((1, 0),), hot=0)])))
    for name, (tile, levels, hot) in FOCAL.items():
        focal = FocalBlockPlan(block=0, tile=tile, levels=levels, hot=hot)
        model = planned_block(layout, planned(focal=[focal]))
        models[f"focal, {name}, {hot} hot keys, in one piece"] = model
        models[f"focal, {name}, {hot} hot keys, in pieces"] = lower(model, "onnxruntime-cpu")
        with_kernel(f"focal, {name}, {hot} hot keys", model)
    core = default_core(128, "weighted")
    assert core is not None
    blocks = {
        f"FNA, S={landmarks}, Newton-Schulz": BlockPlan(block=0, landmarks=landmarks) for landmarks in (16, 64, 128)
    }
    blocks["FNA, S=128, Chebyshev steps"] = BlockPlan(
        block=0, landmarks=128, core=CHEBYSHEV, steps=core.steps, low=core.low
    )
    for name, block in blocks.items():
        models[name] = planned_block(layout, planned(blocks=[block]))
        with_kernel(name, models[name])
    library = build_processor_library()
    sessions = {name: open_session(model, name=name, threads=1) for name, model in models.items()}
    sessions |= {name: open_session(model, name=name, threads=1, operators=library) for name, model in kernels.items()}
    hidden = np.random.default_rng(0).standard_normal((1, layout.tokens, layout.channels)).astype(np.float32)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(arguments.runs + 1):
        for name, session in sessions.items():
            start = time.process_time()
            session.run(None, {"hidden": hidden})
            if turn:
                times[name].append(1e3 * (time.process_time() - start))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    fastest = min(median for name, median in medians.items() if name.startswith("exact"))
    for name, taken in times.items():
        print(f"{name}: {medians[name]:.1f} ms ({min(taken):.1f} to {max(taken):.1f}), {medians[name] / fastest:.2f}")
        if arguments.operators:
            model, operators = (kernels[name], library) if name in kernels else (models[name], None)
            spent = operator_times(model, {"hidden": hidden}, arguments.runs, operators).most_common(6)
            print("    " + ", ".join(f"{operator} {milliseconds:.1f}" for operator, milliseconds in spent))


def operator_times(
    model: ModelProto, inputs: dict[str, NDArray[np.float32]], runs: int, operators: Path | None
) -> Counter[str]:
    """Milliseconds of one run by operator, the mean of so many runs after a first."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile"
        session = open_session(model, name="one form", threads=1, profile=profile, operators=operators)
        for _ in range(runs + 1):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    spent: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] > starts[1]:
            spent[event["args"]["op_name"].replace("FusedMatMul", "MatMul")] += event["dur"] / 1e3 / runs
    return spent


if __name__ == "__main__":
    main()
