"""Data: sources of rows become encoded, packed samples, and every row is accounted for."""
