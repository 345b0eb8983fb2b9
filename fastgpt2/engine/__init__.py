"""A loaded model: text in, text out; uses errors, and nothing else from outside this folder."""
