"""Image files, their expansion to tokens, and the cache of their features."""
