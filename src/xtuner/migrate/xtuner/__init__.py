"""Configs of XTuner 0.1 and 0.2."""
