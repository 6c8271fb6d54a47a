"""What was tried for the CPU kernels, and what it cost."""
