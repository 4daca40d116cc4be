"""Text generation: batches, streaming, stop words."""
