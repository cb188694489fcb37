"""Run stages on a Ray cluster: maps by Ray Data, training by Ray Train and DeepSpeed; a Ray of our own, and jobs."""
