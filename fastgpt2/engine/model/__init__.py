"""What lies on disk: a model's files, and its packed weights; uses kernels, machine and errors."""
