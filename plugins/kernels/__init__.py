"""The GPU kernels, in Triton, and the launch plan and plain-torch twins that go with them."""
