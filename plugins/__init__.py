"""The TensorRT plugin: kernels, their ahead-of-time build, the library, and the same kernels under PyTorch."""
