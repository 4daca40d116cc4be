"""Optimizers, learning rate schedules, flat buffers, loss scaling."""
