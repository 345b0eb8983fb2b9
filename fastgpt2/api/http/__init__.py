"""The HTTP endpoint; uses client, pool, page and protocol."""
