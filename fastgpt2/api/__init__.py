"""The side of the queue that people and programs talk to; it uses protocol, nothing of worker and no numpy."""
