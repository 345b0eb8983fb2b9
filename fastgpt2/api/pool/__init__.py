"""The room that reads the state of a pool, for people and for Prometheus; it uses protocol."""
