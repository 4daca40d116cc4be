"""The device and number type of a run, and the memory and threads of the host."""
