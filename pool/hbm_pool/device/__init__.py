"""Device side of the pool: everything that holds tensors."""
