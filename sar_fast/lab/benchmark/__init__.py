"""Benchmarks: tables, questions, answers, scores, sweeps."""
