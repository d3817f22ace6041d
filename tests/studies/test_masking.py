"""The study of masks runs from the repository's root, as docs/notes/tokens.md says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


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
