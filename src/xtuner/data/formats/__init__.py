"""Dataset formats: one file a format, its name is the value of the setting `dataset_format`."""
