"""Composers that were trained with no triplet: a frozen CLIP model, and nothing else or a small network beside it.

One file a method. All are listed in MODELS beside those of the papers.
"""
