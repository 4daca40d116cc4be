"""Which samples go into which row, in which order."""
