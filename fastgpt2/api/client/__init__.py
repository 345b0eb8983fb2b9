"""The clients, blocking and asyncio, and what they share; uses protocol."""
