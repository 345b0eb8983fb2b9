"""What people and programs talk to; uses protocol, nothing of worker and no numpy."""
