"""A loaded model, text in and text out; uses errors, and nothing else from outside this folder."""
