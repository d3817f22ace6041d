"""From one file to another: lowering, precision, quantisation."""

from __future__ import annotations

from typing import Literal, get_args

Lowering = Literal["portable", "fused", "decomposed", "plugin", "onnxruntime", "onnxruntime-cpu", "onnxruntime-kernels"]
LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)
"""The forms that a file can be given; see `fna.export.passes.lower`."""

KERNEL_FORM: Lowering = "onnxruntime-kernels"
"""What runs with this project's library of onnxruntime operators alone."""

EXACT_FORMS: dict[Lowering, str] = {
    "portable": "MatMul, Softmax, MatMul",
    "fused": "ONNX Attention",
    "onnxruntime": "com.microsoft MultiHeadAttention",
}
"""What onnxruntime computes exact attention of a traced file as, by the file's form."""
