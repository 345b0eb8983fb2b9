"""The processes of one machine: Redis, workers and the endpoint, supervised; uses api, worker and protocol."""
