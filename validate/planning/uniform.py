"""Settings that treat all their blocks alike, run to compare a plan with."""

from __future__ import annotations

from itertools import product

from fna.block_numbers import parse_layers
from fna.plan import Method, uniform_plan
from fna.samplers import DEFAULT_SAMPLER, all_samplers
from fna.validate.planning.candidates import usual_candidate
from fna.validate.planning.planner import Planner
from fna.validate.planning.result import UniformRun

UNIFORM_LANDMARKS = (64, 96, 128, 256)


def uniform_settings() -> list[tuple[str, Method]]:
    """Samplers and methods of users without a plan."""
    weighted: list[tuple[str, Method]] = [(sampler.name, "weighted") for sampler in all_samplers() if sampler.compared]
    return [*weighted, (DEFAULT_SAMPLER, "published")]


def run_uniform_settings(planner: Planner) -> tuple[UniformRun, ...]:
    """Run FNA alike in the later half of the blocks, in all, and in all but the second quarter, on the images held out.

    These are the settings of users without a plan; those that exact attention would be cheaper than are left out.
    """
    layout, cost = planner.layout, planner.cost
    own, exact = layout.own_blocks, cost.exact(layout.heads)
    count = len(own)
    names = [f"{count // 2}-{count - 1}", "all"]
    if count >= 4:
        names.append(f"0-{count // 4 - 1},{count // 2}-{count - 1}")
    sizes = [size for size in UNIFORM_LANDMARKS if layout.prefix_tokens < size < layout.tokens]
    runs = []
    for name, landmarks, (sampler, method) in product(names, sizes, uniform_settings()):
        blocks = [own[place] for place in parse_layers(name, count) if own[place] in planner.blocks]
        block = cost.block(usual_candidate(landmarks, sampler, method), layout.heads, 0)
        total = len(blocks) * block + (count - len(blocks)) * exact
        if not blocks or total >= count * exact:
            continue
        plan = uniform_plan(
            layout.num_blocks,
            layers=",".join(map(str, blocks)),
            landmarks=landmarks,
            sampler=sampler,
            method=method,
            prefix_tokens=layout.prefix_tokens,
        )
        if layout.towers:
            plan = plan.model_copy(update={"version": 4, "towers": layout.towers, "prefix_tokens": None})
        planner.say(f"running blocks {name}, S={landmarks}, {sampler}, {method} for comparison")
        measured = planner.run(plan, planner.held_out)
        runs.append(UniformRun(name, landmarks, sampler, method, total, planner.saved(plan), measured))
    return tuple(runs)
