"""A thin asynchronous client of the Kubernetes API: what operator, sidecar and router need of it.

`client` sends one request at a time with bounded retries, `watch` keeps a list up to date for ever,
`config` finds the server and the credentials. Objects are plain dicts.
"""
