"""Reports on the rows of a run: used, left out, changed and lost."""
