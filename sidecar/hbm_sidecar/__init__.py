"""The sidecar: a supervisor and its three processes (decide, twin, admin)."""
