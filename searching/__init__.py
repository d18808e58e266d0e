"""Searching any folder of images with a trained model: the index, and the page over it."""

from machine.offline import stay_offline

stay_offline()                                                                  # an index may be a stranger's
