"""The data pipeline: read, convert, tokenize, mix and pack rows, and account for each of them."""
