"""Searching any folder of images with a trained model: the index, and the page over it."""

import os

# The encoders that an index or a checkpoint names are looked for on this machine alone: a stranger's could name any of
# the hub's. Read when huggingface_hub is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
