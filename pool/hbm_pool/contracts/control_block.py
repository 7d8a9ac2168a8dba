"""The two files between a model server and its sidecar, and who may write what.

One file per side under the run directory, `server.cb` and `sidecar.cb`: opened read-write by its
owner, read-only by the peer. A region has one writer thread.

| region | writer -> reader | class here |
|---|---|---|
| info, telemetry, requests ring, residency ring + snapshot | server -> sidecar | `Server…` |
| command, decision ring | decide -> server, admin | `Sidecar…` |
| intent, snapshot request | admin -> decide, server | `Sidecar…` |
| curves | twin -> decide | `Sidecar…` |
"""
