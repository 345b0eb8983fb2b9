"""The state of a pool, for people and for Prometheus; uses protocol."""
