"""Jobs in, results out. Knows the engine by `Engine` and its records of requests and results; no array maths."""
