"""What knows nothing of the paper: files, pixels, devices, processes, signals. Nothing here imports the root."""
