"""The Grafana dashboards as code: `python -m hbm_dashboards DIR` writes them as JSON.

`charts/hbm-partition/files/dashboards` holds what it writes; a test keeps both equal.
"""
