"""Loads, adapts, quantizes and saves models; computes log-probabilities of packed rows."""
