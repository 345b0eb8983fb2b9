"""Jobs in, results out: one process that decodes many RQ jobs together; uses protocol and engine."""
