"""The room of the HTTP endpoint; it uses client, pool, page, protocol and the records of a generation."""
