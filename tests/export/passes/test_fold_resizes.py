"""Resizing of constants is done when the file is written; what depends on the input stays."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from fna.export.passes.fold_resizes import fold_constant_resizes
from fna.runtime import open_session, run_session

RANDOM = np.random.default_rng(0)
CONSTANTS = {
    "embedding": RANDOM.standard_normal((1, 17, 6), dtype=np.float32),
    "one": np.array([1]),
    "end": np.array([17]),
    "grid": np.array([1, 4, 4, 6]),
    "sizes": np.array([1, 6, 3, 2]),
}
PIXELS = RANDOM.standard_normal((1, 6, 4, 4), dtype=np.float32)
RESIZE = 'Resize <mode = "cubic", antialias = 1, coordinate_transformation_mode = "half_pixel">'


def make_model() -> ModelProto:
    """A position embedding that is cut, resized and added to the input, which is resized, too."""
    model = onnx.parser.parse_model(f"""<ir_version: 9, opset_import: ["": 18]>
        g (float[1,6,4,4] pixels) => (float[1,6,3,2] out, float[1,16,6] patches) {{
            patches = Slice(embedding, one, end, one)
            square = Reshape(patches, grid)
            channels = Transpose <perm = [0, 3, 1, 2]> (square)
            position = {RESIZE} (channels, , , sizes)
            small = {RESIZE} (pixels, , , sizes)
            out = Add(small, position)
        }}""")
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in CONSTANTS.items())
    onnx.checker.check_model(model)
    return model


def test_a_constant_is_resized_in_the_file_and_an_input_is_not() -> None:
    model = make_model()
    before = run_session(open_session(model), {"pixels": PIXELS})
    assert fold_constant_resizes(model) == 1
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node] == ["Slice", "Resize", "Add"]  # patches are read elsewhere
    assert {tensor.name for tensor in model.graph.initializer} == {"embedding", "one", "end", "sizes", "position"}
    after = run_session(open_session(model), {"pixels": PIXELS})
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    assert fold_constant_resizes(model) == 0
