"""`fna doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from fna.commands.options import json_option


@click.command("doctor", short_help="Show what this machine is and which targets it can build for.")
@json_option
def command(json_file: Path | None) -> None:
    """Say what is on this machine, and for each target whether an engine can be built here, or why not.

    Always prints and ends with 0. `--json -` prints JSON alone. Without click, the same is `python -m fna.engines.doctor`.
    """
    import json

    from fna.engines.doctor import diagnose, format_report

    report = diagnose()
    text = json.dumps(report, indent=2) + "\n"
    if str(json_file) == "-":
        click.echo(text, nl=False)
        return
    click.echo(format_report(report))
    if json_file is not None:
        from fna.files import write_text

        write_text(json_file, text)
