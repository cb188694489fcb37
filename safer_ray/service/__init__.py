"""The scoring service: HTTP in, scores out, on Ray Serve or in one process."""
