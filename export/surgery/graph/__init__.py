"""An ONNX graph as surgery reads it: index, constants, shapes, bounds, input size."""
