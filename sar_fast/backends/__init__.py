"""Backends: how attention, its statistics and its gradients are computed.

A PyTorch backend is a module with ``unsupported``, ``attention`` and ``attention_backward`` for one sequence; the
statistics are shared. The Triton backend computes whole batches in its own kernels. :mod:`.select` chooses one,
:mod:`.run` runs it on real tensors; :mod:`sar_fast.ops` is their only caller.
"""
