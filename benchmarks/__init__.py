"""Datasets beyond the three of the paper, and what every dataset is. Nothing here imports ours but `machine`."""
