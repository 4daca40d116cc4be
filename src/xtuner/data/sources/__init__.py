"""Where rows come from: files, folders and data sets on the hub."""
