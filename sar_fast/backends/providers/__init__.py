"""Other libraries' attention as values: what backend ``"composed"`` takes its outputs from on a GPU.

:mod:`.protocol` says what a provider is, :mod:`.aten` and :mod:`.packages` hold them, :mod:`.choice` registers and
chooses them by a table that a measurement writes.
"""
