"""Workers behind a queue: one that decodes many jobs together beside others, and what the queue costs."""
