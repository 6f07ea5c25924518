"""The thread that computes: jobs, prompts read a chunk at a time, decoding, caches."""
