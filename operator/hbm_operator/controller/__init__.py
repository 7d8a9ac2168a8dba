"""The controller: events fill a store and name keys; one queue of keys; one reconcile per key.

`watching` (kopf) and `uninjected` bring events, `store` keeps what was seen, `queue` says what to
look at next, `partitions`, `policies` and `tenants` compare wish and world and write the
difference, `sweep` goes over everything now and then. `process` puts them together.
"""
