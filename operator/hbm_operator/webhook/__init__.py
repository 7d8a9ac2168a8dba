"""The mutating webhook: an HTTPS server that puts the sidecar into pods as they are created."""
