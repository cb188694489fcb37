"""From files in the wild to pairs, and from pairs to other pairs: formats, sources, planted noise, curation."""
