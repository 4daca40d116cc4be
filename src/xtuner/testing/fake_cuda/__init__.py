"""A CUDA device that computes on the CPU: for tests of the GPU path without a GPU."""
