"""Datasets as tables of images, captions and instances, whatever layout they have on disk."""
