"""Sources of rows: files, folders and data sets on the hub."""
