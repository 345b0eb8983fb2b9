"""The clients, blocking and asyncio, and what they share; they use protocol."""
