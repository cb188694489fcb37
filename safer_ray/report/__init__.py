"""Pages that tell what was found: templates, plots as inline SVG, and the report of a run."""
