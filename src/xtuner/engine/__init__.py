"""The training loop and what it needs: processes, optimizer, checkpoints, hooks."""
