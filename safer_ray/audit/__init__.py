"""Audits: a corpus of any size scored by a bundle, and what is done with the result."""
