"""The HTTP endpoint: what it adds to a request, to a stream and to a start."""
