"""Detectors of suspicious pairs, and how well they find planted errors."""
