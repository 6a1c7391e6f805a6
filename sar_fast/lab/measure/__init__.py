"""What a forward pass does, recorded or timed: statistics, heads, memory."""
