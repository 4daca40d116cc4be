"""Answer requests of several clients: one thread generates, batches and streams.

HTTP ──requests──► Job ──Engine──► RunningBatch per model ──► events ──► HTTP, or the web page
"""
