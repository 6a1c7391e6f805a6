"""Evaluations: benchmarks with their own scoring rules, and the analyses of the paper."""
