"""Triton kernels, one module per family; installed as `peft_kernels.triton_kernels`."""
