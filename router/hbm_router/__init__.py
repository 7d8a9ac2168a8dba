"""Ingress proxy that knows which pod holds which user."""
