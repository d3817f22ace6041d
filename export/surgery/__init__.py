"""Surgery on any ONNX file: find every attention block, replace plain self-attention by FNA, refuse the rest by name."""
