"""The engine by itself: steps, drafts, weights, prompts that begin alike, memory, cold start."""
