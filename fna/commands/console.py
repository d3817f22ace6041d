"""What commands show and write: progress on stderr, results on stdout, JSON where it was asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fna.files import write_text

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.progress import Progress


@contextmanager
def progress(quiet: bool, *, bar: bool = False) -> Iterator[Callable[..., None]]:
    """Show what is being done, and for how long, on stderr while the block runs.

    Yields the function that says what; where there is a bar, it also takes how much of it is done, and of how much.
    """
    with _bars(quiet, bar=bar) as bars:
        task = bars.add_task("starting", total=None)

        def say(text: str, done: int = 0, total: int | None = None) -> None:
            bars.update(task, description=text, completed=done, total=total)

        yield say


@contextmanager
def build_progress(quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int | None], None]]]:
    """Show steps, and a bar for each of the builder's phases, on stderr; yields what tells them.

    The bars disappear with their phases.
    """
    with _bars(quiet, bar=True) as bars:
        main = bars.add_task("starting", total=None)
        tasks: dict[str, Any] = {}

        def say(text: str) -> None:
            bars.update(main, description=text)

        def on_progress(phase: str, done: int, total: int | None) -> None:
            if total is None:
                if phase in tasks:
                    bars.remove_task(tasks.pop(phase))
                return
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield say, on_progress


def _bars(quiet: bool, *, bar: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)  # as it is now: other libraries' chatter is kept from it later
    middle = (BarColumn(bar_width=24), MofNCompleteColumn()) if bar else ()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), *middle, TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def make_console(quiet: bool) -> Console:
    """Return the console for results, on stdout."""
    from rich.console import Console

    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(quiet=quiet, highlight=False, soft_wrap=True, width=160)
    return console


def write_json(json_file: Path | None, answer: BaseModel | dict[str, Any] | str) -> None:
    """Write what `--json` asked for: to its file, whole or not at all, or to stdout for `-`.

    Raises:
        InputFileError: if it cannot be written there.
    """
    if json_file is None:
        return
    if isinstance(answer, dict):
        text = json.dumps(answer, indent=2) + "\n"
    else:
        text = answer if isinstance(answer, str) else answer.model_dump_json(indent=2) + "\n"
    if str(json_file) == "-":
        click.echo(text, nl=False)
    else:
        write_text(json_file, text)
