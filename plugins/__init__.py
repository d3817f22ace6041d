"""The TensorRT plugin: kernels, their ahead-of-time build, the library and its loader."""
