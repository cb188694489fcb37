"""Thin entry points for `ray job submit`: each is one command of `safer-ray`."""
