"""Image files, their place among the tokens, and the features kept of them."""
