"""The files that runs write: read them, list runs, write reports. Does not import torch."""
