"""What device functions hand on together; a kernel's entry point stays flat, and makes them.

A struct keeps no compile-time constant but None, so that sizes and flags stay arguments, and what a call lacks is None.
A function may return one of tensors alone: in Triton 3.4 and 3.6 none with None in it.
"""

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """Rows of one head of one sample, contiguous each."""

    ptr: Any  # to row 0
    stride: Any  # elements from a row to the next


class Edges(NamedTuple):
    """The run of keys that each row of a sample sees, whatever else hides some between them.

    An edge is where its pointer says, or without one where the window is, aligned bottom-right (causal: right = 0).
    """

    num_rows: Any
    num_keys: Any
    left: Any  # keys before the diagonal, where no pointer says; None: there is no left edge
    right: Any  # keys behind it, likewise
    first_ptr: Any  # (Sq,) int32 first key, or None
    end_ptr: Any  # (Sq,) int32 one past the last key, or None


class Mask(NamedTuple):
    """What hides keys of a sample between the edges; None what does not."""

    padding_ptr: Any  # (Sk,) True = real token
    bits_ptr: Any  # (Sq, words) int32, bit j of word w is key 32 w + j
    stride_bits: Any  # words from a row to the next
    tiles_ptr: Any  # (cdiv(Sq, 64), cdiv(Sk, 64)) int8, where any row of a tile sees any key of it


class Softmax(NamedTuple):
    """From a product q.k to its exponent in base 2."""

    scale: Any
    scale_log2: Any  # of what is exponentiated, q.k itself or the capped score; goes into an FMA
    cap: Any  # None: no soft cap
