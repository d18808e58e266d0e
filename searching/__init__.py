"""Searching any folder of images with a trained model: the index, and the page over it."""
