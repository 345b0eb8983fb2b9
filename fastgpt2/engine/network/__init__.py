"""One forward step of GPT-2; uses model and kernels."""
