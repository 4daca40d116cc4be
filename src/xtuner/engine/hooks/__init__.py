"""Watchers of a run: one file a hook; its class `Hook` is made for every run and says itself if it
is wanted."""
