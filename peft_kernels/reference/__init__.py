"""Plain PyTorch definitions of every operator: what the kernels are tested against, and the last fallback."""
