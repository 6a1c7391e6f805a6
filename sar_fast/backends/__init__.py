"""Backends: how attention, its statistics and its gradients are computed.

:mod:`.protocol` says what one is, :mod:`.select` holds and chooses them, and the operators call them. The Triton
backend computes whole batches in its own kernels. The two of PyTorch are modules with ``unsupported``, ``attention``
and ``attention_backward`` for one sequence, which :mod:`.host_loop` runs over a call's sequences.
"""
