"""The table of compiled kernels: which chips, compiling, writing it for the library, reading it for PyTorch."""
