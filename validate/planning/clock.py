"""What a block costs by the clock of this machine's onnxruntime: each candidate's operator is run once and remembered."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from fna.attention import NEWTON_SCHULZ_ITERATIONS
from fna.chebyshev import CHEBYSHEV
from fna.correction import Correction
from fna.engines.lowerings import processor_form
from fna.export.passes.lower import lower
from fna.machine import describe_machine, tool_versions
from fna.plan import BlockPlan, Plan
from fna.runtime import open_session, run_session
from fna.samplers import DEFAULT_SAMPLER, find_sampler
from fna.validate.planning.cache import load_or_make
from fna.validate.planning.candidates import AnyCandidate, Candidate, FocalCandidate
from fna.validate.planning.cost import share_of_choice
from fna.validate.planning.one_block import EXACT_FORMS, exact_block, planned_block
from fna.validate.planning.subject import Layout

CPU = "cpu"
"""The target that is this machine's processor."""

RUNS, MOST_SECONDS = 6, 0.6
"""Runs of one operator after the first, which is not counted, until they took so long together; the fastest counts."""

LANDMARKS = 64
"""Of what corrections, split heads and samplers are timed with."""


class CpuCost:
    """Seconds of onnxruntime on this machine, batch 1, fp32, in the form that it is given files in.

    FNA on some of the heads is taken as a linear share, besides what taking heads apart and joining them costs. Corrections,
    samplers and splits are timed with one number of landmarks and added.
    """

    unit = "seconds"

    def __init__(self, layout: Layout, folder: Path | None, say: Callable[[str], None] = lambda _text: None) -> None:
        """Nothing is timed yet; `folder` is where times are remembered, None remembers none."""
        self.layout, self.folder, self.say = layout, folder, say
        self._times: dict[str, float] = {}
        count = min(LANDMARKS, layout.tokens - 1)
        self._usual = Candidate(count, DEFAULT_SAMPLER, False, NEWTON_SCHULZ_ITERATIONS)
        machine = (describe_machine(), tool_versions("onnxruntime"))
        sizes = (layout.tokens, layout.heads, layout.head_size, layout.prefix_tokens, layout.patches)
        form = processor_form()
        self._settings = (*machine, *sizes, form.lowering, form.library and form.library.parent.name)

    def exact(self, heads: int) -> float:
        """See `CostModel.exact`: whole blocks in the fastest form, as MatMul, Softmax, MatMul where heads are split."""
        if heads == self.layout.heads:
            return self.baseline()[0]
        return self.exact_form(EXACT_FORMS[0]) * heads / self.layout.heads

    def baseline(self) -> tuple[float, str]:
        """See `CostModel.baseline`: the fastest form that onnxruntime has."""
        return min((self.exact_form(form), form) for form in EXACT_FORMS)

    def exact_form(self, form: str) -> float:
        """Seconds of exact attention of all heads in one of `EXACT_FORMS`."""
        return self._time(f"exact attention, {form}", lambda: exact_block(self.layout, form))

    def block(self, candidate: AnyCandidate, heads: int, kernel: int) -> float:
        """See `CostModel.block`."""
        if isinstance(candidate, FocalCandidate):
            return self._time(str(candidate), lambda: self._planned(Plan(num_blocks=1, focal=(candidate.plan(0),))))
        seconds = self._nystrom(candidate) * heads / self.layout.heads + self._choice(candidate)
        if kernel:
            seconds += self._extra("a correction", self._typical(kernel=kernel)) * heads / self.layout.heads
        others = self.layout.heads - heads
        if others:
            half = tuple(range(self.layout.heads // 2))
            apart = self._time("half of the heads", lambda: self._nystrom_block(self._typical(heads=half)))
            share = len(half) / self.layout.heads
            joining = apart - self._nystrom(self._usual) * share - self.exact(self.layout.heads - len(half))
            seconds += max(joining, 0.0) + self.exact(others)
        return seconds

    def _nystrom(self, candidate: Candidate) -> float:
        core, name = candidate.chebyshev, f"{candidate.iterations} iterations"
        settings: dict[str, Any] = {"iterations": candidate.iterations}
        if core is not None:
            name = f"{core.steps} Chebyshev steps from {core.low:g}"
            settings = {"core": CHEBYSHEV, "steps": core.steps, "low": core.low}
        name = f"FNA, S={candidate.landmarks}, {name}"
        block = BlockPlan(block=0, landmarks=candidate.landmarks, **settings)
        return self._time(name, lambda: self._nystrom_block(block))

    def _choice(self, candidate: Candidate) -> float:
        """Seconds of choosing landmarks from the image, this block's share of them."""
        sampler = find_sampler(candidate.sampler)
        if not sampler.looks_at_features:
            return 0.0
        once = self._extra(f"landmarks by {sampler.name}", self._typical(sampler=sampler.name))
        steps = sampler.passes(candidate.landmarks) / sampler.passes(self._usual.landmarks)
        return once * steps * share_of_choice(candidate, self.layout)

    def _extra(self, name: str, block: BlockPlan) -> float:
        """Seconds that a block takes beyond the typical one."""
        return max(self._time(name, lambda: self._nystrom_block(block)) - self._nystrom(self._usual), 0.0)

    def _typical(self, kernel: int = 0, **settings: Any) -> BlockPlan:
        heads = self.layout.heads
        correction = None
        if kernel:
            correction = Correction(size=kernel, kernels=((0.01,) * kernel**2,) * heads, gains=(1.0,) * heads)
        return BlockPlan(block=0, landmarks=self._usual.landmarks, correction=correction, **settings)

    def _nystrom_block(self, block: BlockPlan) -> ModelProto:
        return self._planned(Plan(num_blocks=1, blocks=(block,)))

    def _planned(self, plan: Plan) -> ModelProto:
        layout = self.layout
        return planned_block(
            layout, plan.model_copy(update={"prefix_tokens": layout.prefix_tokens, "patches": layout.patches})
        )

    def _time(self, name: str, make: Callable[[], ModelProto]) -> float:
        def measure() -> float:
            self.say(f"timing {name}")
            return _fastest(make(), self.layout)

        if name not in self._times:
            place = f"time-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
            self._times[name] = load_or_make(self.folder, place, self._settings, measure)
        return self._times[name]


def _fastest(model: ModelProto, layout: Layout) -> float:
    """Seconds of the fastest run."""
    form = processor_form()
    session = open_session(lower(model, form.lowering), name="one block", operators=form.library)
    hidden = np.random.default_rng(0).standard_normal((1, layout.tokens, layout.heads * layout.head_size))
    inputs = {"hidden": hidden.astype(np.float32)}
    run_session(session, inputs)
    times: list[float] = []
    while len(times) < RUNS and sum(times) < MOST_SECONDS:
        start = time.perf_counter()
        run_session(session, inputs)
        times.append(time.perf_counter() - start)
    return min(times)
