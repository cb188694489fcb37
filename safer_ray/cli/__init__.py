"""The command line `safer-ray`."""

from safer_ray.cli.app import main

__all__ = ["main"]
