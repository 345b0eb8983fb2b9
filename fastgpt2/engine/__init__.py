"""Arrays in, tokens out. Nothing here knows of Redis, RQ or HTTP."""
