"""Measurements of what fastgpt2 claims about its speed and memory: one script a claim, sorted by what is measured."""
