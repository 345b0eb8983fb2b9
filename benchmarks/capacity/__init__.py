"""The load that one Redis bears, the memory that a worker holds, and the needs of a thousand workers."""
