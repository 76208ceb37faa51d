"""The engine: requests, the sequences that run, the loop, what comes of it."""
