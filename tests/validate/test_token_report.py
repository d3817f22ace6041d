"""`fna inspect --tokens`: what it prints, writes and draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fna.cli import main
from fna.commands.console import make_console
from fna.commands.inspect import print_tokens
from fna.plan import TokenRange, parse_plan, uniform_plan
from fna.validate.token_report import BlockReport, FoundToken, ImageReport, TokenReport, propose

FACTORY = """
import torch
from transformers import Dinov2Config, Dinov2Model

def tiny(massive=(4, 11)):
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14)
    ).eval()
    model.embeddings.position_embeddings.data[:, list(massive), 0] += 500.0
    return model

def plain():
    return tiny(())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model factory and one photograph."""
    (tmp_path / "surveyfactory.py").write_text(FACTORY)
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (80, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "noise.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_planted_massive_tokens_are_printed_written_and_drawn(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["inspect", "surveyfactory:tiny", "--tokens", "--images", "images", "--resolution", "56"]
    assert main([*command, "--json", "report.json", "--output", "pictures"]) == 0
    printed = capsys.readouterr().out
    assert "massive 4 at row 0, column 3" in printed
    assert "massive 11 at row 2, column 2" in printed
    assert "skipped broken.png" in printed
    assert "8 massive and" in printed  # two tokens in four blocks
    report = TokenReport.model_validate_json((here / "report.json").read_text())
    for block in report.images[0].blocks:
        assert [(token.token, token.row, token.column) for token in block.massive] == [(4, 0, 3), (11, 2, 2)]
        assert all(token.value > 400 for token in block.massive)
        assert block.gap > report.minimal_ratio
    assert '{"landmarks_include": [{"blocks": "1-3", "tokens": "massive"}]}' in printed
    assert [set(proposal.plan) for proposal in report.proposals] == [
        {"masks", "landmarks_exclude"},
        {"landmarks_include"},
    ]
    for proposal in report.proposals:  # as they are printed, they are lines of a plan
        lines = proposal.model_dump(mode="json")["plan"]
        plan = uniform_plan(4, layers="all", landmarks=6).model_dump() | lines
        assert parse_plan(json.dumps(plan)).find_landmark_range(
            "include" if "landmarks_include" in lines else "exclude", 2
        ) == (1, TokenRange(blocks="1-3", tokens="massive"))
    with Image.open(here / "pictures" / "tokens-noise.png") as picture:
        red, green, blue = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int).T
    assert ((red > 180) & (green < 90) & (blue < 90)).sum() > 100  # two squares in each of four panels


def test_a_model_with_none_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "surveyfactory:plain", "--tokens", "--images", "images", "--json", "-", "--quiet"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert all(not block["massive"] for block in answer["images"][0]["blocks"])
    assert all("massive" not in json.dumps(proposal) for proposal in answer["proposals"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x.onnx", "--tokens"], "--tokens looks into a PyTorch model"),
        (["x.onnx", "--resolution", "56"], "belong to --tokens"),
        (["surveyfactory:plain", "--tokens", "--images", "nowhere"], "image folder nowhere does not exist"),
        (["surveyfactory:plain", "--tokens", "--images", "images", "--resolution", "60"], "60 is not a multiple"),
        (["surveyfactory:plain", "--tokens", "--output", "no/where"], "output folder no/where cannot be made"),
    ],
)
def test_bad_input_is_one_line(here: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_is_found_on_few_photographs_is_not_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    def image(*blocks: tuple[bool, bool]) -> ImageReport:
        token = (FoundToken(token=5, row=0, column=4, value=1.0),)
        entries = (
            BlockReport(
                block=number, name="", median_norm=1, largest_norm=1, gap=1, massive=token * large,
                class_attention_to_itself=1, artifacts=token * artifact,
            )
            for number, (large, artifact) in enumerate(blocks)
        )  # fmt: skip
        return ImageReport(image="", blocks=tuple(entries))

    nothing, last = (False, False), (True, False)
    assert propose([image(nothing, nothing)]) == ()
    assert propose([image(nothing, last)]) == (), "no block comes after the last"
    often = [image(nothing, last, (False, True)), image(nothing, nothing, nothing)]
    mask, include = propose(often)
    assert include.plan == {"landmarks_include": (TokenRange(blocks="2", tokens="massive"),)}
    assert mask.plan["masks"] == (TokenRange(blocks="2", tokens="massive"),), "one mask for a block"
    few = (*often, image(nothing, nothing, nothing))
    assert propose(few) == ()
    report = TokenReport(
        model="m", height=1, width=1, prefix_tokens=1, minimal_ratio=3, images=few, proposals=propose(few)
    )
    print_tokens(make_console(False), report)
    assert "in no block on half of the photographs" in capsys.readouterr().out
    (artifacts,) = propose([image((False, True), (False, True), nothing)])
    assert artifacts.plan["masks"] == (TokenRange(blocks="0-1", tokens="artifact"),)
