"""The study of masks, on a tiny model; and as docs/notes/tokens.md runs it, from the repository's root."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from fna.export.sources.loading import LoadedModel, wrap_model
from fna.validate.token_report import survey_photographs
from studies import masking
from studies.masking import (
    measure_digits,
    measure_guided,
    measure_landmarks,
    measure_photographs,
    planted,
    segmentation_smoothness,
    write_report,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A model without massive tokens, and planting that fits it."""
    monkeypatch.setattr(masking, "PLANTED_BLOCK", 1)
    monkeypatch.setattr(masking, "PLANTED_CHANNELS", (7,))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    return wrap_model("plain", Dinov2Model(Dinov2Config(**sizes)).eval())


def photographs() -> list[tuple[str, Image.Image]]:
    generator = np.random.default_rng(1)
    return [(name, Image.fromarray(generator.integers(0, 255, (70, 70, 3), dtype=np.uint8))) for name in ("a", "b")]


def test_smoothness_is_the_share_of_neighbours_in_one_segment() -> None:
    left_right = np.zeros((4, 6, 2), np.float32)
    left_right[:, :3, 0], left_right[:, 3:, 1] = 1, 1
    pairs = 3 * 6 + 4 * 5
    assert segmentation_smoothness(left_right.reshape(24, 2), (4, 6), 2) == pytest.approx((pairs - 4) / pairs)
    chequered = np.eye(2, dtype=np.float32)[np.indices((4, 6)).sum(0) % 2]
    assert segmentation_smoothness(chequered.reshape(24, 2), (4, 6), 2) == 0.0


def test_planting_ends_with_its_context(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "PLANTED_TOKENS", 2)
    before = survey_photographs(model, photographs()[:1], (56, 56))
    with planted(model, True):
        during = survey_photographs(model, photographs()[:1], (56, 56))
    assert [len(block.massive) for block in during.images[0].blocks] == [0, 2, 2, 2]
    assert survey_photographs(model, photographs()[:1], (56, 56)) == before


def test_the_measurement_of_masking_runs_on_a_tiny_model(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "PLANTED_TOKENS", 2)
    results = measure_photographs(model, photographs(), 56, 4)
    choices = measure_landmarks(model, photographs(), 56, 4)
    assert len(results) == 2 * 2 * 2 * 5
    first = results[0]
    assert (first.attention, first.mask, first.planted, first.masked_tokens) == ("exact", "none", False, 0)
    assert first.patch_cosine == pytest.approx(1.0)
    by_condition = {(r.attention, r.mask, r.planted): r for r in results if r.image == "a"}
    assert by_condition["exact", "massive", True].masked_tokens == 4  # two tokens in the two blocks after the planting
    assert by_condition["exact", "massive", False].patch_cosine == pytest.approx(1.0)
    guaranteed = next(c for c in choices if c.planted and c.landmarks == "massive guaranteed")
    assert guaranteed.artifacts_or_massive == 2 * 2 * 2  # images, blocks, tokens
    report = write_report(results, [], choices)
    assert "| planted | exact | massive, sinks |" in report
    assert torch.isfinite(torch.tensor([c.error for c in choices])).all()


def test_the_digits_are_probed_with_planted_tokens_too(model: LoadedModel) -> None:
    """84 pixels are 37 tokens, of which 4 can be massive: planted after block 1, masked in blocks 2 and 3 of 4."""
    results = measure_digits(model, 40, attentions=["FNA"], only_masks=["none", "massive, sinks"])
    assert [(r.planted, r.mask, r.masked_tokens) for r in results] == [
        (False, "none", 0.0),
        (False, "massive, sinks", 0.0),
        (True, "none", 0.0),
        (True, "massive, sinks", 2.0),
    ]
    assert results[0].accuracy == results[1].accuracy
    assert all((r.train, r.test) == (20, 20) for r in results)


def test_the_measurement_of_guided_landmarks_runs_on_a_tiny_model(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "PLANTED_TOKENS", 2)
    results = measure_guided(model, photographs()[:1], 56, 6)
    by_condition = {(r.planted, r.sampler, r.landmarks): r for r in results}
    assert len(by_condition) == len(results) == 2 * (6 + 3 + 6 + 6)
    for planting in (False, True):
        plain, included = (by_condition[planting, "grid", name] for name in ("none", "massive included"))
        assert (plain.patch_cosine == included.patch_cosine) is not planting
        assert plain.patch_cosine == plain.same_cosine or planting
    assert "| planted | fps | massive masked and excluded |" in write_report([], [], [], results)


def test_masks_take_planted_tokens_out(tmp_path: Path) -> None:
    output = tmp_path / "digits.json"
    command = [sys.executable, "-m", "studies.masking", "--only-digits", "--digits", "16", "--attention", "exact"]
    command += ["--mask", "none", "--mask", "massive", "--json", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    probes = {(probe["planted"], probe["mask"]): probe for probe in json.loads(output.read_text())["digits"]}
    masked = {condition: probe["masked_tokens"] for condition, probe in probes.items()}
    assert masked[False, "none"] == masked[True, "none"] == masked[False, "massive"] == 0
    assert masked[True, "massive"] > 1
    assert "| planted | exact | massive |" in done.stdout
