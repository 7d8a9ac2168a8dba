"""Reference model server: HSTU over one pool shared by embedding rows and KV pages."""
