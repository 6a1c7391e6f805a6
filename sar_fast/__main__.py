"""``python -m sar_fast`` is ``sar-fast``."""

from sar_fast.cli import main

if __name__ == "__main__":
    main()
