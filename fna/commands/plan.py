"""`fna plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fna.commands import options
from fna.commands.console import make_console, progress, write_json
from fna.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image

    from fna.plan import Plan
    from fna.validate.planning.cost import CostModel
    from fna.validate.planning.fidelity import Fidelity
    from fna.validate.planning.planner import Planner
    from fna.validate.planning.result import Planned
    from fna.validate.planning.subject import Subject
    from fna.validate.planning.wish import Wish

FEW_IMAGES = 4
USUAL_COSINE, USUAL_P5 = 0.99, 0.97


@click.command("plan", short_help="Choose blocks, heads and landmarks for a fidelity and a device.")
@click.argument("model")
@options.output(required=True, help="The plan file to write.")
@options.images(
    help="Folder of photographs; a quarter is held out to verify on.  [default: eight that scikit-image and matplotlib carry]",
)
@click.option(
    "--verify-images",
    type=options.PATH,
    help="Folder of other photographs to verify on.  [default: a quarter of --images, or five other bundled ones]",
)
@click.option(
    "--min-cosine",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Mean cosine of the final patch tokens to exact attention.  [default: 0.99, or any with --min-task]",
)
@click.option(
    "--min-p5",
    type=click.FloatRange(0, 1, max_open=True),
    help="Its 5th percentile.  [default: 0.97 where --min-cosine is left out too, else any]",
)
@click.option(
    "--min-task",
    "min_tasks",
    multiple=True,
    metavar="TASK:MEASURE=MINIMUM",
    help="A number of fna validate --task to keep, such as saliency:IoU=0.97 or segmentation:mIoU=0.9; repeat for several.",
)
@options.target(
    help="Device whose predicted time is made small; cpu is this machine's onnxruntime.  [default: products are made few]",
)
@options.precision(type=click.Choice(("fp32", "fp16")), default="fp16", show_default=True, help="On the target.")
@click.option("--measured", type=options.PATH, help="JSON of fna bench that the prediction is calibrated by.")
@options.weights()
@click.option("--tower", help="The tower to plan for, in a model of several.  [default: each in turn]")
@options.resolution(help="Image size: 518, or HEIGHTxWIDTH.  [default: the model's own]")
@click.option(
    "--samplers",
    help=f"Which to try, of {', '.join(options.SAMPLERS)}.  [default: all but fps and random]",
)
@click.option("--own-landmarks", is_flag=True, help="Leave out landmarks that blocks share: each chooses its own.")
@click.option("--no-focal", is_flag=True, help="Leave out focal attention: blocks are exact or FNA.")
@click.option(
    "--whole-blocks/--split-heads",
    default=None,
    help="FNA on all heads of a block, or also on some.  [default: split with a --target, where the clock says that it pays]",
)
@click.option("--no-corrections", is_flag=True, help="FNA as it is, without kernels fitted to the images.")
@click.option(
    "--compare", is_flag=True, help="Run settings alike in all blocks on the images held out, to compare with."
)
@click.option("--cache", type=options.PATH, help="Folder of finished steps.  [default: the user's cache folder]")
@options.plot(help="The picture of the front.  [default: beside the plan, .png]")
@options.json_file()
@options.quiet()
def command(
    model: str,
    output: Path,
    images: Path | None,
    verify_images: Path | None,
    target: str | None,
    precision: str,
    measured: Path | None,
    weights: Path | None,
    tower: str | None,
    resolution: tuple[int, int] | None,
    compare: bool,
    cache: Path | None,
    plot: Path | None,
    json_file: Path | None,
    quiet: bool,
    **wishes: Any,
) -> None:
    """Find the cheapest plan that keeps MODEL's outputs, verify it on photographs that it was not made from, and write it.

    MODEL is what fna export takes, or an ONNX file. Without --target the plan with the fewest products of attention is sought, with
    it the fastest. A run that is interrupted goes on where it was. Exit code 1 when the verification falls short.
    """
    picture = plot or output.with_suffix(".png")
    for path in (output, picture):
        check_writable(path)
    wish = make_wish(**wishes, timed=target is not None)
    with progress(quiet) as say:
        say("importing PyTorch")
        import json

        from fna.errors import CheckFailedError
        from fna.export.sources.model_names import with_weights
        from fna.files import write_text
        from fna.validate.planning.report import as_json, draw_front
        from fna.validate.planning.towers import check_grids, join_plans, leave_out_small, share_wish

        subjects = open_subjects(with_weights(model, weights), resolution, say, tower)
        subjects, notes = leave_out_small(subjects, wish)
        check_grids([subject.layout for subject in subjects])
        shared = share_wish(wish, len(subjects))
        parts = []
        for subject in subjects:
            cost = _cost_model(subject, target, precision, measured, cache, say)
            names, planner = _make_planner(subject, shared, cost, images, verify_images, cache, say)
            names["notes"] += [*notes, *_describe_prediction(cost)]
            notes = []
            parts.append(_PlannedPart(subject, cost, names, planner, _plan_one(planner, compare, names, target)))
        plan = join_plans([part.planned.plan for part in parts])
        reached, point = parts[0].planned.reached, parts[0].planned.point.measured
        if len(parts) > 1:
            say("running the plan of all towers")
            # each on the output that its tower has a part in
            points = [part.planner.run(plan, part.planner.held_out) for part in parts]
            point = max(points, key=wish.excess)
            reached = wish.excess(point) <= 1
        write_text(output, json.dumps(plan.model_dump(mode="json", exclude_none=True), indent=1) + "\n")
        say("drawing")
        answers = {}
        for part in parts:
            part.picture = (
                picture if len(parts) == 1 else picture.with_stem(f"{picture.stem}-{part.subject.layout.tower}")
            )
            layout = part.subject.layout
            size = f"{layout.resolution[0]}x{layout.resolution[1]}"
            title = f"{part.name} at {size}: {layout.tokens} tokens, {layout.num_blocks} blocks"
            draw_front(part.planned, part.cost.unit, part.picture, title=title, wish=part.planner.wish)
            answers[str(layout.tower)] = as_json(part.planned, part.cost.unit)
        write_json(json_file, next(iter(answers.values())) if len(parts) == 1 else {"towers": answers})
    for part in parts:
        _print(part, output, quiet)
    if not reached and point is not None:
        asked = parts[0].planner.wish if len(parts) == 1 else wish
        raise CheckFailedError(
            f"on {len(parts[0].names['verified'])} images that it was not planned on, the plan has mean cosine {point.describe()}, "
            f"but {asked.describe()} was asked for; plan on more images like those, or ask for a little more"
        )


@dataclass
class _PlannedPart:
    """The plan of one tower, or of the only one, and what it was made from."""

    subject: Subject
    cost: CostModel
    names: dict[str, list[str]]
    planner: Planner
    planned: Planned
    picture: Path = Path()

    @property
    def name(self) -> str:
        """The model's name, and the tower's."""
        layout = self.subject.layout
        return layout.model if layout.tower is None else f"{layout.model}, tower {layout.tower}"


def _plan_one(planner: Planner, compare: bool, names: dict[str, list[str]], target: str | None) -> Planned:
    from dataclasses import replace

    from fna.validate.planning.best_plan import make_best_plan
    from fna.validate.planning.uniform import run_uniform_settings

    planned = make_best_plan(planner)
    if compare:
        planned = replace(planned, uniform=run_uniform_settings(planner))
    made_from = _made_from(planned, planner.wish, names, target)
    return replace(planned, plan=planned.plan.model_copy(update={"made_from": made_from}))


def plan_automatically(model: str, size: tuple[int, int] | None, say: Callable[[str], None]) -> Plan:
    """Make the plan of `--layers auto`: all defaults of `fna plan`."""
    from fna.validate.planning.best_plan import make_best_plan
    from fna.validate.planning.cost import ProductCost
    from fna.validate.planning.towers import check_grids, join_plans, leave_out_small, share_wish

    subjects, _ = leave_out_small(open_subjects(model, size, say), make_wish())
    check_grids([subject.layout for subject in subjects])
    wish = share_wish(make_wish(), len(subjects))
    plans = []
    for subject in subjects:
        _, planner = _make_planner(subject, wish, ProductCost(subject.layout), None, None, None, say)
        plans.append(make_best_plan(planner).plan)
    return join_plans(plans)


def make_wish(
    min_cosine: float | None = None,
    min_p5: float | None = None,
    min_tasks: tuple[str, ...] = (),
    samplers: str | None = None,
    own_landmarks: bool = False,
    no_focal: bool = False,
    whole_blocks: bool | None = None,
    no_corrections: bool = False,
    timed: bool = False,
) -> Wish:
    """Turn the options into what the planner is asked for.

    Where time is what counts, focal attention is tried without hot keys too: finding them takes few products but reads all queries
    and keys.
    """
    from dataclasses import replace

    from fna.errors import InvalidArgumentError

    names = None if samplers is None else tuple(name.strip() for name in samplers.split(","))
    unknown = [name for name in names or () if name not in options.SAMPLERS]
    if unknown:
        raise InvalidArgumentError(f"sampler {unknown[0]!r} is not known; choose among {', '.join(options.SAMPLERS)}")
    from fna.validate.planning.candidates import HOT_COUNTS, SearchRange, focal_candidates
    from fna.validate.planning.goals import parse_goal
    from fna.validate.planning.wish import Wish

    goals = tuple(parse_goal(text) for text in min_tasks)
    if min_cosine is None and not goals:
        min_cosine, min_p5 = USUAL_COSINE, USUAL_P5 if min_p5 is None else min_p5
    tried = SearchRange(shared=not own_landmarks, corrections=not no_corrections)
    if names is not None:
        tried = replace(tried, samplers=names)
    if timed:
        tried = replace(tried, focal=focal_candidates((0, *HOT_COUNTS)))
    if no_focal:
        tried = replace(tried, focal=())
    return Wish(min_cosine, min_p5, goals, whole_blocks, tried)


def open_subjects(
    model: str, size: tuple[int, int] | None, say: Callable[[str], None], tower: str | None = None
) -> list[Subject]:
    """Open what is planned for: an ONNX file, or the towers of a model as `fna export` takes it."""
    say(f"loading {model}")
    if model.endswith(".onnx"):
        from fna.validate.planning.onnx_subject import OnnxSubject

        return [OnnxSubject(Path(model), size)]
    from fna.export.sources.loading import load_model
    from fna.validate.planning.subject import TorchSubject
    from fna.validate.planning.towers import towers_to_plan

    loaded = load_model(model)
    return [TorchSubject(loaded, *(size or loaded.native_size), name) for name in towers_to_plan(loaded, tower)]


def _cost_model(
    subject: Subject,
    target: str | None,
    precision: str,
    measured: Path | None,
    cache: Path | None,
    say: Callable[[str], None],
) -> CostModel:
    from fna.errors import InvalidArgumentError
    from fna.validate.planning.cost import ProductCost, TimeCost, device_of, read_calibration

    if target is None:
        if measured is not None:
            raise InvalidArgumentError(
                "--measured calibrates a prediction of time: give the --target that was measured"
            )
        return ProductCost(subject.layout)
    from fna.validate.planning.clock import CPU, CpuCost

    if target == CPU:
        if measured is not None:
            raise InvalidArgumentError("--measured calibrates a prediction, but --target cpu measures: leave out one")
        return CpuCost(subject.layout, _cache_folder(cache), say)
    from fna.engines.targets import find_target

    device = device_of(find_target(target), precision)
    calibration = None if measured is None else read_calibration(measured, subject.layout, device)
    return TimeCost(subject.layout, device, calibration)


def _describe_prediction(cost: CostModel) -> list[str]:
    from fna.validate.planning.cost import TimeCost

    return [cost.describe()] if isinstance(cost, TimeCost) else []


def _make_planner(
    subject: Subject,
    wish: Wish,
    cost: CostModel,
    images: Path | None,
    verify_images: Path | None,
    cache: Path | None,
    say: Callable[[str], None],
) -> tuple[dict[str, list[str]], Any]:
    from fna.validate.planning.planner import Planner

    planned_on, verified, notes = _choose_images(images, verify_images)
    height, width = subject.layout.resolution
    arrays = [
        [subject.preprocessing.apply(image, height, width) for _, image in group] for group in (planned_on, verified)
    ]
    names = {
        "planned": [name for name, _ in planned_on],
        "verified": [name for name, _ in verified],
        "notes": notes,
    }
    return names, Planner(subject, wish, cost, arrays[0], arrays[1], _cache_folder(cache), say)


def _cache_folder(cache: Path | None) -> Path:
    from fna.export.sources.dino_saliency import cache_folder

    return cache or cache_folder() / "planning"


def _choose_images(
    images: Path | None, verify_images: Path | None
) -> tuple[list[tuple[str, Image]], list[tuple[str, Image]], list[str]]:
    """Return photographs to plan on, others to verify on, and what should be said about them."""
    from fna.export.preprocessing import bundled_photographs, load_images
    from fna.validate.planning.images import planning_photographs

    notes: list[str] = []
    if images is None:
        planned_on, held_out = planning_photographs(), bundled_photographs()
    else:
        photographs, skipped = load_images(images)
        notes += [f"skipped {line}" for line in skipped]
        # every fourth, so that a folder sorted by subject gives some of each
        held = [] if verify_images is not None or len(photographs) == 1 else list(range(len(photographs)))[1::4]
        planned_on = [image for number, image in enumerate(photographs) if number not in held]
        held_out = [photographs[number] for number in held]
        if len(photographs) == 1 and verify_images is None:
            notes.append("one image cannot both be planned and verified on: verified on the bundled photographs")
            held_out = bundled_photographs()
    if verify_images is not None:
        held_out, skipped = load_images(verify_images)
        notes += [f"skipped {line}" for line in skipped]
    if len(planned_on) < FEW_IMAGES:
        notes.append(f"planned on {len(planned_on)} images only: {FEW_IMAGES} or more make a plan that holds on others")
    return planned_on, held_out, notes


def _made_from(planned: Planned, wish: Wish, names: dict[str, list[str]], target: str | None) -> dict[str, Any]:
    from fna import __version__

    measured = planned.point.measured
    return {
        "fna": __version__,
        "images": names["planned"],
        "verified_on": names["verified"],
        "min_cosine": wish.min_cosine,
        "min_tasks": {goal.name: goal.minimum for goal in wish.goals},
        "target": target,
        "saved_products": round(planned.point.saved, 4),
        "verified": None if measured is None else measured.model_dump(),
    }


def _print(part: _PlannedPart, output: Path, quiet: bool) -> None:
    from rich.table import Table

    from fna.validate.planning.report import count_heads, describe_cost

    console = make_console(quiet)
    planned, cost, names, layout = part.planned, part.cost, part.names, part.subject.layout
    console.print(
        f"{part.name} at {layout.resolution[0]}x{layout.resolution[1]}: {layout.tokens} tokens, {layout.num_blocks} blocks of "
        f"{layout.heads} heads; planned on {len(names['planned'])} images, verified on {len(names['verified'])} others",
        markup=False,
    )
    for note in [*names["notes"], *planned.notes]:
        console.print(f"note: {note}", markup=False)
    table = Table(box=None, pad_edge=False)
    of_time = cost.unit == "seconds"
    titles = (
        "",
        "FNA heads",
        "focal blocks",
        "predicted time" if of_time else "products",
        "products saved",
        "mean, predicted",
        "mean",
        "p5",
        "class",
    )
    tasks = [goal.name for goal in part.planner.wish.goals]
    for title in (*titles, *tasks):
        table.add_column(title, justify="right", no_wrap=True)
    for point in planned.front:
        table.add_row(
            "*" if point.plan == planned.point.plan else "",
            f"{count_heads(point, layout.heads)} of {layout.heads * layout.num_blocks}",
            f"{len(point.plan.focal)} of {layout.num_blocks}",
            describe_cost(point.cost, cost.unit),
            f"{point.saved:.1%}",
            f"{1 - point.predicted_loss:.5f}",
            *_cells(point.measured, tasks),
        )
    for setting in planned.uniform:
        spent = describe_cost(setting.cost, cost.unit)
        table.add_row("", setting.label, "", spent, f"{setting.saved:.1%}", "", *_cells(setting.measured, tasks))
    console.print(table)
    console.print(
        f"exact attention: {describe_cost(planned.exact_cost, cost.unit)}   plan: {output}   picture: {part.picture}",
        markup=False,
    )


def _cells(measured: Fidelity | None, tasks: Sequence[str]) -> list[str]:
    if measured is None:
        return [""] * (3 + len(tasks))
    values = [f"{measured.mean:.5f}", f"{measured.p5:.5f}", _optional(measured.first)]
    return values + [f"{measured.tasks[name]:.4f}" for name in tasks]


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
