"""Tokens from logits, from a request to its result; uses network and what lies below."""
