"""The optimisers and converters that files have been through when they reach graft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import surgery_zoo as zoo

Optimiser = Callable[[Path, Path], None]


def offline(level: ort.GraphOptimizationLevel) -> Optimiser:
    def run(source: Path, target: Path) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 4
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return run


def fusion(model_type: str, *, multi_head: bool = False) -> Optimiser:
    def run(source: Path, target: Path) -> None:
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        options = FusionOptions(model_type)
        if multi_head:
            options.use_multi_head_attention = True
        optimised = optimizer.optimize_model(
            str(source),
            model_type=model_type,
            num_heads=zoo.HEADS,
            hidden_size=zoo.DIM,
            opt_level=0,
            optimization_options=options,
        )
        optimised.save_model_to_file(str(target))

    return run


def float16(*, keep_io_types: bool) -> Optimiser:
    def run(source: Path, target: Path) -> None:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=keep_io_types), target)

    return run


def slim(source: Path, target: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), target)


def simplify(source: Path, target: Path) -> None:
    import onnxsim

    model, checked = onnxsim.simplify(onnx.load(source))
    assert checked
    onnx.save(model, target)


def quantize_dynamically(source: Path, target: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(source), str(target))


def quantize(source: Path, target: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class OneImage(CalibrationDataReader):
        def __init__(self) -> None:
            image = np.random.default_rng(0).standard_normal((2, 3, zoo.IMAGE, zoo.IMAGE)).astype(np.float32)
            self.images: Iterator[dict[str, np.ndarray]] = iter([{"x": image}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.images, None)

    quantize_static(str(source), str(target), OneImage(), quant_format=QuantFormat.QDQ)


OPTIMISERS: dict[str, Optimiser] = {
    "onnxslim": slim,
    "onnxsim": simplify,
    "ort_basic": offline(ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
    "ort_extended": offline(ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED),
    "ort_all": offline(ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
    "fusion_vit": fusion("vit"),
    "fusion_mha": fusion("vit", multi_head=True),
    "fusion_clip": fusion("clip"),
    "float16": float16(keep_io_types=False),
    "float16_io": float16(keep_io_types=True),
    "quantized_dynamically": quantize_dynamically,
    "quantized": quantize,
}
