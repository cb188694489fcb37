"""`serve run serve.app:build auditor=DIR [KEY=VALUE …]`: the application of `safer_ray.service.app`, in a checkout."""

from safer_ray.service.app import build

__all__ = ["build"]
