"""What a run is made of: its data, its loop, and what it keeps and shows. Nothing here imports `searching`."""
