"""The example of surgery from a script, and Polygraphy with our pattern file, run on a small model."""

from __future__ import annotations

import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import surgery_zoo as zoo
import torch
import yaml

from fna.export.surgery.graft import inspect_file
from fna.export.surgery.recognise.rows import Decision

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain block, then a causal one."""
    model = zoo.Vit(zoo.Separate)
    model.blocks[1].attn = zoo.Altered("causal")
    path = tmp_path_factory.mktemp("surgery") / "mixed.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            zoo.randomise(model), (torch.zeros(1, 3, zoo.IMAGE, zoo.IMAGE),), str(path),
            dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
        )  # fmt: skip
    return path


def test_the_example_replaces_what_is_plain_and_writes_a_file_that_runs(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.onnx"
    replaced = runpy.run_path(str(EXAMPLES / "graph_surgery.py"))["main"](mixed, output)
    said = capsys.readouterr().out
    assert replaced == 1
    assert "causal" in said
    assert "still exact: /blocks.1/" in said
    image = np.random.default_rng(0).standard_normal((1, 3, zoo.IMAGE, zoo.IMAGE)).astype(np.float32)
    before, after = (
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": image})[0]
        for path in (mixed, output)
    )
    # 16 of 17 tokens are landmarks, so the result is near
    assert np.abs(after - before).max() < 0.2 * np.abs(before).max()


def test_polygraphy_finds_the_blocks_that_inspect_calls_eligible(mixed: Path, tmp_path: Path) -> None:
    config = tmp_path / "blocks.yaml"
    command = [
        sys.executable, "-c", "from polygraphy.tools import main; main()",
        "plugin", "match", str(mixed), "--plugin-dir", str(EXAMPLES / "polygraphy_plugins"), "-o", str(config),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (plugin,) = yaml.safe_load_all(config.read_text())
    rows = [row for row in inspect_file(mixed) if row.decision is Decision.ELIGIBLE]
    assert len(rows) == 1
    assert plugin["op"] == "FastNystromAttention"
    attention = rows[0].attention
    assert attention is not None
    assert plugin["instances"] == [
        {
            "inputs": [operand.tensor for operand in attention.operands],
            "outputs": [attention.result.tensor],
            "attributes": {"scale": pytest.approx(attention.scale)},
        }
    ]
