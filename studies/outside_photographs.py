"""How close plans keep a model on photographs that no plan was made or verified on: `python -m studies.outside_photographs PLAN...`.

A plan is a file of `fna plan`, or `focal:TILE:LEVELS:HOT`, all blocks alike, as in `focal:8:1,0/2,2:16`, each with its own draw, or
`nystrom:LAYERS:S:METHOD`, as in `nystrom:6-11:128:weighted`. `default` is what `fna export`
makes of a model when it is told nothing.
Prints the products saved and the cosines of the final patch tokens to exact attention on three groups of photographs: those that
`fna plan` measures losses on, those that it verifies on, and seven others that scikit-image carries.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from fna.arithmetic import saved_part
from fna.default_plan import plan_without_photographs
from fna.export.preprocessing import bundled_photographs
from fna.export.sources.loading import load_model
from fna.plan import FocalBlockPlan, Plan, load_plan, uniform_plan
from fna.validate.planning.fidelity import measure_fidelity
from fna.validate.planning.images import planning_photographs
from fna.validate.planning.subject import TorchSubject

OUTSIDE = ("brick", "gravel", "moon", "page", "cell", "retina", "immunohistochemistry")


def outside_photographs() -> list[tuple[str, Image.Image]]:
    """Photographs that are in neither group of `fna plan`."""
    from skimage import data

    return [(name, Image.fromarray(getattr(data, name)()).convert("RGB")) for name in OUTSIDE]


GROUPS = {"planned on": planning_photographs, "verified on": bundled_photographs, "outside": outside_photographs}


def read_plan(text: str, subject: TorchSubject) -> Plan:
    """A plan file, the default, a setting of focal attention for all blocks, or one of FNA."""
    layout = subject.layout
    if text == "default":
        return plan_without_photographs(layout.num_blocks, set(layout.refused), layout.patches, layout.prefix_tokens)[0]
    if text.startswith("nystrom:"):
        _, layers, landmarks, method = text.split(":")
        return uniform_plan(
            layout.num_blocks,
            layers=layers,
            landmarks=int(landmarks),
            method=method,
            prefix_tokens=layout.prefix_tokens,
        )  # type: ignore[arg-type]
    if not text.startswith("focal:"):
        return load_plan(Path(text))
    _, tile, levels, hot = text.split(":")
    pairs = tuple((int(size), int(gap)) for size, gap in (level.split(",") for level in levels.split("/")))
    blocks = tuple(
        FocalBlockPlan(block=number, tile=int(tile), levels=pairs, hot=int(hot), seed=number)
        for number in range(layout.num_blocks)
    )
    return Plan(num_blocks=layout.num_blocks, focal=blocks, prefix_tokens=layout.prefix_tokens, patches=layout.patches)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+")
    parser.add_argument("--model", default="dinov2-small-saliency")
    parser.add_argument("--resolution", type=int, default=518)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    arguments = parser.parse_args()
    side = arguments.resolution
    subject = TorchSubject(load_model(arguments.model), side, side)
    layout = subject.layout
    pixels = {
        name: [subject.preprocessing.apply(image, side, side) for _, image in GROUPS[name]()]
        for name in arguments.groups
    }
    exact = {name: [subject.tokens(subject.run(image, None)) for image in images] for name, images in pixels.items()}
    for text in arguments.plans:
        plan = read_plan(text, subject)
        saved = saved_part(plan, layout.tokens, layout.heads, layout.head_size)
        print(f"{text}: {saved:.1%} of the products saved")
        for name, images in pixels.items():
            given = [subject.tokens(subject.run(image, plan)) for image in images]
            found = measure_fidelity(exact[name], given, layout.prefix_among(len(given[0])))
            first = "" if found.first is None else f", class token {found.first:.4f}"
            print(f"  {name}: mean {found.mean:.4f}, 5th percentile {found.p5:.4f}{first}", flush=True)


if __name__ == "__main__":
    main()
