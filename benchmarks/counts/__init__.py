"""What the CUDA kernels ask of the memory, counted on an emulated device: not timed."""
