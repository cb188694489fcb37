"""Variants of the autoencoder beyond TopK, a file each."""
