"""The language of both ends of the queue, client and worker; uses only the engine's records and errors."""
