"""The network computes one forward step of GPT-2; it uses the model, the kernels and the machine."""
