"""What fastgpt2 claims about its speed and memory, measured: one script a claim, sorted by what is measured."""
