"""The command line. Commands are imported when they are called, so that help needs neither torch nor TensorRT."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from fna import __version__
from fna.errors import FnaError

# name -> (module, what it does); the module holds a click command named `command`.
COMMANDS = {
    "export": ("fna.commands.export", "Trace a PyTorch model to an ONNX file with FNA."),
    "graft": ("fna.commands.graft", "Replace the self-attention in an ONNX file by FNA."),
    "plan": ("fna.commands.plan", "Choose blocks, heads and landmarks for a fidelity and a device."),
    "inspect": ("fna.commands.inspect", "Show what attention is in an ONNX file, or what an engine is."),
    "build": ("fna.commands.build", "Build an engine from an FNA file."),
    "run": ("fna.commands.run", "Run an engine or an ONNX file on images."),
    "validate": ("fna.commands.validate", "Measure how far a file is from PyTorch, step by step."),
    "plugin": ("fna.commands.plugin", "Compile kernels and TensorRT plugin, or list them."),
    "bundle": ("fna.commands.bundle", "Pack what a device needs to build, check and time its own engine."),
    "bench": ("fna.commands.bench", "Time dense against FNA on this machine."),
    "doctor": ("fna.commands.doctor", "Show what this machine is and which targets it can build for."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they run, and whose help comes from the table above."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names in the order of the pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fna")
def cli() -> None:
    """Vision Transformers with Fast Nyström Attention, from PyTorch to ONNX to TensorRT engines.

    Exit codes: 0 done; 1 ran, but a check failed; 2 bad input or usage; 3 this machine lacks something (a GPU, TensorRT).
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every expected error is one line on stderr."""
    try:
        words = list(arguments) if arguments is not None else sys.argv[1:]
        cli.main(args=words, prog_name="fna", standalone_mode=False, obj=words)
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.Abort:
        return _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "see fna --help")
        return 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f" (see {context.command_path} --help)" if context is not None else ""
        return _fail(f"{_one_line(error.format_message())}{hint}", 2)
    except FnaError as error:
        return _fail(_one_line(str(error)), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("FNA_DEBUG"):
            raise
        return _fail(
            f"internal error: {type(error).__name__}: {_one_line(str(error))} (FNA_DEBUG=1 shows the traceback)", 1
        )
    return 0


def run_and_exit() -> None:
    """Entry point of the command and of `python -m fna.cli`."""
    code = main()
    # The interpreter looks for cycles once more before it ends, half a second after a large model; all memory goes with it.
    # Triton's bindings print a page about what was not collected by then, so it looks where they are loaded.
    if "triton" not in sys.modules:
        gc.freeze()
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    click.echo(f"fna: {message}", err=True)
    return code


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    run_and_exit()
