"""Options that commands share are declared once."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import click
import pytest

from fna.cli import COMMANDS
from fna.commands import options
from fna.errors import InvalidArgumentError

FOLDER = Path(options.__file__).parent


def commands() -> dict[str, click.Command]:
    return {name: import_module(module).command for name, (module, _) in COMMANDS.items()}


def test_no_flag_is_declared_in_two_places() -> None:
    """But for those that mean different things: a batch size of a file, several precisions, runs to time or times to show."""
    places: dict[str, list[str]] = {}
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text()
        for call in re.findall(r"click\.option\b,?\(?(.*?)(?:help=|type=)", text, re.DOTALL):
            for flag in re.findall(r'"(--[a-z0-9-]+)', call)[:1]:
                places.setdefault(flag, []).append(path.stem)
    assert len(places) > 40
    assert {flag: files for flag, files in places.items() if len(set(files)) > 1} == {
        "--backend": ["bench", "build"],
        "--batch": ["export", "options", "options"],
        "--bench": ["run", "validate"],
        "--precision": ["bundle", "options"],
    }


def test_a_shared_option_says_the_same_in_every_command() -> None:
    seen: dict[str, set[object]] = {}
    for command in commands().values():
        for parameter in command.params:
            for flag in ("--sampler", "--method", "--seed", "--prefix-tokens", "--plan"):
                if flag in parameter.opts:
                    choices = getattr(parameter.type, "choices", ())
                    seen.setdefault(flag, set()).add(
                        (getattr(parameter, "help", ""), tuple(choices), parameter.default)
                    )
    assert {flag: len(said) for flag, said in seen.items()} == dict.fromkeys(seen, 1)


def test_a_plan_option_is_declared_once_and_reaches_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from fna.plan import Plan

    assert set(options.PLAN) - {"layers", "landmarks", "sampler"} <= set(Plan.model_fields)
    settings = {"layers": "1", "landmarks": 4, "sampler": "grid", "method": "published", "seed": 7}
    plan = options.PlanChoice(settings, None).make(3, landmarks=5)
    assert (plan.blocks[0].block, plan.blocks[0].landmarks, plan.method, plan.seed) == (1, 5, "published", 7)


def test_planning_is_refused_where_there_is_no_one_resolution() -> None:
    choice = options.PlanChoice({"layers": "auto"}, None)
    assert choice.is_automatic
    with pytest.raises(InvalidArgumentError, match="--layers auto plans for one resolution"):
        choice.make(3)
    assert not options.PlanChoice({"layers": "auto"}, Path("plan.json")).is_automatic


@pytest.mark.parametrize(("text", "size"), [("518", (518, 518)), ("518x784", (518, 784))])
def test_a_resolution_is_a_side_or_height_and_width(text: str, size: tuple[int, int]) -> None:
    assert options.Resolution().convert(text, None, None) == size
