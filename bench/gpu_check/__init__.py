"""``make gpu-check``: what a GPU is asked in the minutes that it is at hand."""
