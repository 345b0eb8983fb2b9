"""A model as it lies on disk: its files, and its packed weights; uses kernels, machine and errors."""
