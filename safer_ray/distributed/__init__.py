"""Run stages on a Ray cluster: the only part of the library that imports ray."""
