"""`fna plan` and `--plan` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fna.cli import main
from fna.commands.plan import make_wish
from fna.plan import load_plan

FACTORY = """
import torch
from transformers import Dinov2Config, Dinov2Model

def tiny(blocks=2):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=blocks, num_attention_heads=2, image_size=112, patch_size=14)
    return Dinov2Model(config)

def other():
    return tiny(3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factory module and five photographs of noise."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "planfactory.py").write_text(FACTORY)
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for number in range(5):
        pixels = random.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def _here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FNA_CACHE", str(tmp_path / "cache"))


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan made by the command, with its picture and its record."""
    output = tmp_path_factory.mktemp("made") / "plan.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        arguments = ["plan", "planfactory:tiny", "-o", output, "--images", "images", "--resolution", "140", "--quiet"]
        arguments += ["--samplers", "lattice", "--min-cosine", "0.9", "--cache", output.parent / "cache"]
        assert main([str(item) for item in [*arguments, "--json", output.with_name("record.json")]]) == 0
    return output


def test_the_command_writes_a_plan_a_picture_and_a_record(made: Path) -> None:
    plan = load_plan(made)
    assert plan.model == "planfactory:tiny"
    assert plan.resolution == (140, 140)
    assert plan.made_from["images"] == ["0.png", "2.png", "3.png", "4.png"]
    assert plan.made_from["verified_on"] == ["1.png"]
    with Image.open(made.with_suffix(".png")) as picture:
        assert picture.format == "PNG"
    record = json.loads(made.with_name("record.json").read_text())
    assert [row for row in record["front"] if row["chosen"]]
    assert record["plan"]["blocks"] == plan.model_dump(mode="json")["blocks"]


def test_export_takes_the_size_from_the_plan(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    code, out, err = call(capsys, "export", "planfactory:tiny", "-o", tmp_path / "a.onnx", "--plan", made)
    assert (code, err) == (0, "")
    assert "FNA blocks" in out


def test_a_plan_for_another_model_or_size_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path
) -> None:
    output = tmp_path / "a.onnx"
    code, _, err = call(capsys, "export", "planfactory:tiny", "-o", output, "--plan", made, "--resolution", 154)
    assert code == 2
    assert "140x140 images, but the resolution is 154x154" in err
    code, _, err = call(capsys, "export", "planfactory:other", "-o", output, "--plan", made)
    assert code == 2
    assert "planfactory:tiny, but the model is planfactory:other" in err
    assert not output.exists()


def test_a_plan_edited_by_hand_is_refused_naming_the_key(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path
) -> None:
    document = json.loads(made.read_text())
    document["blocks"][0]["landmark"] = 3
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(document))
    code, _, err = call(capsys, "export", "planfactory:tiny", "-o", tmp_path / "a.onnx", "--plan", edited)
    assert code == 2
    assert "blocks.0.landmark" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--min-cosine", "1.5"], "min-cosine"),
        (["--samplers", "best"], "sampler 'best' is not known"),
        (["--target", "toaster"], "toaster"),
        (["--measured", "x.json"], "give the --target"),
        (["--images", "nowhere"], "nowhere"),
        (["--resolution", "141"], "multiple of"),
        (["--min-task", "saliency"], "write TASK:MEASURE=MINIMUM"),
        (["--min-task", "saliency:IoU=0.9"], "saliency:IoU cannot be measured on this model"),
    ],
)
def test_bad_input_exits_with_2_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, extra: list[str], said: str
) -> None:
    arguments = ["plan", "planfactory:tiny", "-o", tmp_path / "plan.json", "--resolution", "140", *extra]
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "plan.json").exists()


def test_a_task_can_be_the_goal_and_uniform_settings_the_comparison(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output, record = tmp_path / "plan.json", tmp_path / "record.json"
    arguments = ["plan", "planfactory:tiny", "-o", output, "--resolution", "140", "--images", "images", "--compare"]
    code, out, _ = call(capsys, *arguments, "--min-task", "Segmentation:miou=0.3", "--json", record)
    assert code == 0
    assert "segmentation:mIoU" in out
    assert load_plan(output).made_from["min_tasks"] == {"segmentation:mIoU": 0.3}
    assert load_plan(output).made_from["min_cosine"] is None
    document = json.loads(record.read_text())
    assert document["plan"]["made_from"]["verified"]["tasks"]["segmentation:mIoU"] >= 0.3
    assert all("segmentation:mIoU" in row["measured"]["tasks"] for row in document["front"] + document["uniform"])


@pytest.mark.parametrize(
    ("cosine", "p5", "tasks", "asked"),
    [(None, None, (), 0.99), (None, 0.95, (), 0.99), (None, 0.95, ("saliency:IoU=0.9",), None), (0.9, None, (), 0.9)],
)
def test_a_cosine_is_asked_for_unless_a_task_is(
    cosine: float | None, p5: float | None, tasks: tuple[str, ...], asked: float | None
) -> None:
    assert make_wish(cosine, p5, tasks).min_cosine == asked


def test_too_few_images_are_warned_of(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "a.png").write_bytes((folder / "images" / "0.png").read_bytes())
    arguments = ["plan", "planfactory:tiny", "-o", tmp_path / "plan.json", "--resolution", "140", "--images", few]
    code, out, _ = call(capsys, *arguments, "--samplers", "lattice", "--min-cosine", "0.9")
    assert code == 0
    assert "planned on 1 images only" in out
    assert "verified on the bundled photographs" in out


def test_where_fna_does_not_pay_the_command_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["plan", "planfactory:tiny", "-o", tmp_path / "plan.json", "--resolution", "140", "--images", "images"]
    code, out, _ = call(capsys, *arguments, "--samplers", "lattice", "--no-focal", "--target", "jetson-agx-orin")
    assert code == 0
    assert "at 101 tokens on jetson-agx-orin (fp16) exact attention is faster: break-even is at about" in out
    assert load_plan(tmp_path / "plan.json").blocks == ()


def test_focal_attention_without_hot_keys_is_tried_where_time_counts() -> None:
    assert {candidate.hot for candidate in make_wish().tried.focal} == {16, 64}
    assert {candidate.hot for candidate in make_wish(timed=True).tried.focal} == {0, 16, 64}
    assert make_wish(timed=True, no_focal=True).tried.focal == ()
