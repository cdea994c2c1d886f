"""One training run: batches to parameters."""
