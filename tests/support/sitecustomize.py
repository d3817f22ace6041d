"""What `torchvision` needs beside a PyTorch that it was not built for: the schemas that its compiled part would register.

Python imports this module when it starts, in every process that has this folder on its PYTHONPATH: `fna` itself too.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any


class _BeforeTorchvision(MetaPathFinder):
    """Registers them when torchvision is about to be imported, and not before: PyTorch is slow to import."""

    schemas: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing."""
        if name == "torchvision" and self.schemas is None:
            import torch

            self.schemas = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _BeforeTorchvision())
