"""Load, adapt, quantise and save models; attention and loss over packed rows."""
