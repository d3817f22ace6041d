"""Speed: models, kernels and engines, exact against FNA."""

from __future__ import annotations

from typing import Literal, get_args

Backend = Literal["onnxruntime", "onnxruntime-cuda", "torch", "torch-compile", "tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""What `fna bench` can run models on."""
