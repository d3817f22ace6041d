"""`fna doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from fna.commands import options
from fna.commands.console import write_json


@click.command("doctor", short_help="Show what this machine is and which targets it can build for.")
@options.json_file()
def command(json_file: Path | None) -> None:
    """Say what is on this machine, and for each target whether an engine can be built here, or why not.

    Always prints and ends with 0. `--json -` prints JSON alone. Without click, the same is `python -m fna.engines.doctor`.
    """
    from fna.engines.doctor import diagnose, format_report

    report = diagnose()
    if str(json_file) != "-":
        click.echo(format_report(report))
    write_json(json_file, report)
