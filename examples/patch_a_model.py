"""Fast Nyström Attention in a PyTorch model, and how far its tokens are from exact attention.

The built-in model has real weights (DINOv2-S), fetched on first use. Any vision model of transformers goes the same way.
"""

from __future__ import annotations

import numpy as np
import torch

import fna
from fna.export.preprocessing import bundled_photographs
from fna.export.sources.loading import load_model
from fna.plan import uniform_plan

RESOLUTION = 224
SETTINGS = (("6-11", 64), ("6-11", 32), ("all", 64))

loaded = load_model("dinov2-small-saliency")
model = loaded.module
photographs = [image for _, image in bundled_photographs()]
pixel_values = torch.from_numpy(
    np.stack([loaded.preprocessing.apply(image, RESOLUTION, RESOLUTION) for image in photographs])
)


def run() -> torch.Tensor:  # [B, N, C]
    """Return the final tokens, the class token first."""
    with torch.inference_mode():
        outputs = dict(zip(loaded.output_names, model(pixel_values), strict=True))
    return outputs["tokens"]


exact = run()
print(f"{exact.shape[1]} tokens, {len(photographs)} photographs; cosine to exact attention:")
for layers, landmarks in SETTINGS:
    fna.patch(model, uniform_plan(loaded.num_blocks, layers=layers, landmarks=landmarks))
    similarity = torch.nn.functional.cosine_similarity(exact, run(), dim=-1)  # [B, N]
    fna.unpatch(model)
    print(
        f"blocks {layers:>4}, {landmarks} landmarks: class token {similarity[:, 0].mean():.4f}, "
        f"patches {similarity[:, 1:].mean():.4f}"
    )

assert torch.equal(exact, run()), "unpatching gives back exactly the model it was"
