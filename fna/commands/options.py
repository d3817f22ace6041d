"""Options that several commands share, and how their text becomes values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fna.errors import InvalidArgumentError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from fna.plan import Plan

Function = TypeVar("Function", bound=Callable[..., Any])

SAMPLERS = ("grid", "lattice", "norm-grid", "fps", "random")
METHODS = ("weighted", "published")


def plan_options(function: Function) -> Function:
    """Add the options that say which blocks become FNA, and how."""
    for decorate in reversed(
        (
            click.option(
                "--layers",
                help="Blocks that become FNA: 6-11, or 0-2,6-11, all, none, or auto (see fna plan).  [default: the later half]",
            ),
            click.option(
                "--landmarks", type=click.IntRange(min=1), default=64, show_default=True, help="Landmarks S per block."
            ),
            click.option(
                "--sampler",
                type=click.Choice(SAMPLERS),
                default="grid",
                show_default=True,
                help="How landmarks are chosen.",
            ),
            click.option(
                "--method",
                type=click.Choice(METHODS),
                default="weighted",
                show_default=True,
                help="weighted: landmark weights and exact rows; published: the paper's.",
            ),
            click.option(
                "--plan", "plan_file", type=click.Path(path_type=Path), help="A plan file instead of the options above."
            ),
        )
    ):
        function = decorate(function)
    return function


def precision_options(function: Function) -> Function:
    """Add the options that cast a file: precision, int8, and blocks that stay fp32."""
    for decorate in reversed(
        (
            click.option(
                "--precision",
                type=click.Choice(("fp32", "fp16", "bf16")),
                help="Cast weights and activations; inputs, outputs, norms and softmax stay fp32.  [default: the file's]",
            ),
            click.option("--int8", is_flag=True, help="Linear layers in int8, calibrated on the photographs."),
            click.option("--keep-fp32", help="Blocks that stay fp32, as in 0,11."),
        )
    ):
        function = decorate(function)
    return function


def image_options(function: Function) -> Function:
    """Add the option that says which photographs are used."""
    return click.option(
        "--images",
        type=click.Path(path_type=Path),
        help="Folder of photographs.  [default: five that scikit-image and scikit-learn carry]",
    )(function)


json_option = click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every number as JSON.")
quiet_option = click.option("--quiet", is_flag=True, help="Print nothing but errors.")


def make_plan(num_blocks: int, options: dict[str, Any], **settings: Any) -> Plan:
    """Return the plan of `--plan`, or the uniform plan of the other options.

    Raises:
        InputFileError, InvalidPlanError: naming what was wrong.
    """
    from fna.plan import load_plan, uniform_plan

    if options["plan_file"] is not None:
        return load_plan(options["plan_file"])
    if options["layers"] == "auto":
        raise InvalidArgumentError(
            "--layers auto plans for one resolution, which this command does not: make a plan with fna plan and give it as --plan"
        )
    return uniform_plan(
        num_blocks,
        layers=options["layers"],
        landmarks=options["landmarks"],
        sampler=options["sampler"],
        method=options["method"],
        **settings,
    )


def parse_resolution(text: str | None) -> tuple[int, int] | None:
    """Parse `518` or `HEIGHTxWIDTH` to pixels; None stays None.

    Raises:
        InvalidArgumentError: for other text.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text.strip())
    if match is None:
        raise InvalidArgumentError(f"resolution {text!r} cannot be read; write 518 or 518x784 (height x width)")
    return int(match[1]), int(match[2] or match[1])


def load_photographs(folder: Path | None) -> tuple[list[tuple[str, Image]], list[str]]:
    """Return the photographs of `--images`, or the bundled ones, and a line for each file that could not be read."""
    from fna.export.preprocessing import bundled_photographs, load_images

    return (bundled_photographs(), []) if folder is None else load_images(folder)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show what is being done, and for how long, on stderr while the block runs; yields the function that says what."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task("starting", total=None)

        def say(text: str) -> None:
            bars.update(task, description=text)

        yield say


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[..., None]]:
    """As `progress`, with a bar: the function that it yields takes what is being done, how much of it is done, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        task = bars.add_task("starting", total=None)

        def say(text: str, done: int = 0, total: int | None = None) -> None:
            bars.update(task, description=text, completed=done, total=total)

        yield say


def make_console(quiet: bool) -> Console:
    """Return the console for results, on stdout."""
    from rich.console import Console

    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(quiet=quiet, highlight=False, soft_wrap=True, width=160)
    return console
