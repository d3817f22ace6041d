"""Fast Nyström Attention for Vision Transformers: PyTorch, ONNX and TensorRT.

Names are imported on first use, so that `fna --help` does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fna.attention import fast_nystrom_attention as fast_nystrom_attention
    from fna.focal import focal_attention as focal_attention
    from fna.patching import patch as patch
    from fna.patching import unpatch as unpatch
    from fna.plan import Plan as Plan
    from fna.samplers import landmark_bias as landmark_bias
    from fna.samplers import select_landmarks as select_landmarks

__version__ = "0.1.0"

_EXPORTS = {
    "fast_nystrom_attention": "fna.attention",
    "focal_attention": "fna.focal",
    "select_landmarks": "fna.samplers",
    "landmark_bias": "fna.samplers",
    "Plan": "fna.plan",
    "patch": "fna.patching",
    "unpatch": "fna.patching",
}

__all__ = [
    "Plan",
    "__version__",
    "fast_nystrom_attention",
    "focal_attention",
    "landmark_bias",
    "patch",
    "select_landmarks",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'fna' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
