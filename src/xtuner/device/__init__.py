"""The device and dtype of a run, and the memory and threads of the host."""
