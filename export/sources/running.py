"""Running loaded models in PyTorch, as they are or with FNA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from fna.export.metadata import FileMetadata
from fna.export.sources.loading import LoadedModel
from fna.patching import patch, unpatch
from fna.plan import Plan
from fna.runtime import Arrays


def run_torch(
    model: LoadedModel,
    pixels: NDArray[np.float32],  # [B, 3, H, W]
) -> Arrays:
    """Run a model in PyTorch fp32, an image at a time, and return its outputs by name."""
    batches = []
    with torch.inference_mode():
        for image in pixels:
            batches.append([tensor.float().numpy() for tensor in model.module(torch.from_numpy(image[None]))])
    return {
        name: np.concatenate(parts) for name, parts in zip(model.output_names, zip(*batches, strict=True), strict=True)
    }


@contextmanager
def patched(model: LoadedModel, plan: FileMetadata | Plan) -> Iterator[None]:
    """Have the model compute FNA by a plan (or a file's plan) within the block."""
    patch(model.module, plan if isinstance(plan, Plan) else plan.plan)
    try:
        yield
    finally:
        unpatch(model.module)
