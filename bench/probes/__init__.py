"""Seven questions to a GPU, before kernels are chosen for it; docs/kernels.md, Probes.

``python -m bench.probes`` builds the probes' program, runs each probe as a process of its own,
within a time of its own, and says what was found and what follows. Standard library only, as
bench.gpu_check: it runs before anything is known about the Python that runs it.
"""
