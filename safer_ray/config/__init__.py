"""What a run is told: one frozen model a stage, read from YAML; imports neither torch nor ray."""
