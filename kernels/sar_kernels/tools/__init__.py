"""Compiler budgets and tile search; no call runs them."""
