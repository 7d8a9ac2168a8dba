"""Host side of the pool: extents, replacement, KV index, memory planning. No torch here."""
