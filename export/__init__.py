"""Model sources, tracing PyTorch to ONNX, surgery on ONNX, function bodies and lowering."""
