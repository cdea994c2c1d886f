"""Examples to batches; no JAX in here."""
