"""What both ends of the queue speak; uses the engine's records and errors."""
