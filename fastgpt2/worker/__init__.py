"""Jobs in, results out. Knows the engine through `Engine` and `Decoder` only; no array maths."""
