"""A soak: thousands of jobs while workers, supervisors, Redis and connections are killed, stopped and cut at random."""
