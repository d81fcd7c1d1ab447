"""Operations on GPUs: library matrix products around the Triton kernels of `vlmkern.kernels`, imported on first use."""
