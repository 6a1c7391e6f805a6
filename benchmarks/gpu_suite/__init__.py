"""Parts of ``benchmarks/gpu.py``: what is measured, how it is timed, and what it is compared with."""
