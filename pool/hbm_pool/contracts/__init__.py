"""What two processes must agree on. Neither torch nor numba is imported here.

`identity` names users and rows, `records` is the layout of the control block, `control_block`
its files, `digest` what a pod tells the router, `headers` the HTTP headers of the project.
"""
