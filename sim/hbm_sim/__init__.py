"""Simulated nodes that run the pool's own index code: the static sweep for α*."""
