"""Sparse autoencoders: the model, its training, its quality, and its formats on disk."""
