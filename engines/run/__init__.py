"""Running ONNX files and engines."""
