"""Decoding turns logits into tokens, from a request to its result; it uses the network and what lies below."""
