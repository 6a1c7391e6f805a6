"""What ``benchmarks/gpu.py`` runs: slices of a few tens of seconds, each ended by its own budget, each resumable.

``slices`` lists them, ``run`` starts them in a worker process (``worker``, ``bench``), ``device`` times, ``records``
remembers, ``precompile`` compiles beforehand, ``goals`` compares.
"""
