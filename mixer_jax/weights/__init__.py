"""Parameters outside a run: files, formats, names."""
