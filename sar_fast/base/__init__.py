"""What everything stands on: errors, JSON, numbers as Python's, optional packages, weight files."""
