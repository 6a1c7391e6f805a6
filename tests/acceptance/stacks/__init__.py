"""What ``training_stacks.py`` runs, each module in an environment of its own stack: ``python -m ... FOLDER``."""
