"""The training loop: steps, processes, states on disk, progress."""
