"""The one entry point `hbm`."""
