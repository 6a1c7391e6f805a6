"""The method on torch alone: the values of a call, roles, the prior, weightings, the oracle (docs/method.md)."""
