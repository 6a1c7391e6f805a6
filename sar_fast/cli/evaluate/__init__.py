"""``experiments/evaluate.py``: flags and YAML of evaluations, and the calls of the laboratory that they stand for."""
