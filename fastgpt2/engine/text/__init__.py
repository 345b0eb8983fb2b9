"""A text and its tokens: the tokenizer that a folder describes, and text from token ids; uses model."""
