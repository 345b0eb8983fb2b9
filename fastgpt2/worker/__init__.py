"""Jobs in, results out: one process that decodes many RQ jobs together; uses protocol and engine.

Whatever talks to Redis here raises redis-py's RedisError if Redis cannot be reached or takes no commands.
"""
