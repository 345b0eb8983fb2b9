"""The room that reads the state of a pool, for people and for Prometheus; it uses protocol.

What reads with a connection raises RedisError if Redis cannot be reached; what takes a client, QueueUnavailable.
"""
