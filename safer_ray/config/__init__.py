"""The configuration of a run: one frozen model a stage, read from YAML; imports neither torch nor ray."""
