"""A CUDA device that computes on the CPU, to test the GPU path without a GPU."""
