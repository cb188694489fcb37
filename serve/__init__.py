"""The scoring service on Ray Serve."""
