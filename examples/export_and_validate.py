"""From a PyTorch model to an ONNX file, and the error of each step on photographs.

The commands `fna export` and `fna validate` do this. Here it is in Python, for scripts of your own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fna.export.preprocessing import bundled_photographs
from fna.export.sources.loading import load_model
from fna.export.trace import TraceOptions, export_onnx
from fna.plan import uniform_plan
from fna.validate.budget.measure import validate_file

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/example")
folder.mkdir(parents=True, exist_ok=True)
path = folder / "model.onnx"

model = load_model("dinov2-small-saliency")
plan = uniform_plan(model.num_blocks, layers="6-11", landmarks=64)
export_onnx(model, plan, TraceOptions(height=224, width=224), path)
print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")

validation, _ = validate_file(path, bundled_photographs()[:2])
for step in (*validation.steps, validation.total):
    for error in step.errors:
        print(
            f"{step.step:>13}, {error.output}: relative L2 error {error.relative_l2:.1e}, mean cosine {error.cosine_mean:.5f}"
        )

failures = validation.failures()
sys.exit("\n".join(failures) if failures else 0)
