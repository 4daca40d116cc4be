"""The hooks of a run, one file each: its class `Hook` is created for every run and decides whether
it is active."""
