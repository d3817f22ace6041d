"""The ONNX operators of domain `fna`: signatures and bodies."""
