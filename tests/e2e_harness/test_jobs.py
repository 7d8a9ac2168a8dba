"""Scrape jobs out of PodMonitors, as the Prometheus operator reads them."""

from hbm_e2e.prometheus import Job, jobs_of


def test_each_endpoint_is_a_job_where_its_monitor_looks() -> None:
    monitors = [
        {
            "metadata": {"name": "operator", "namespace": "hbm-system"},
            "spec": {
                "selector": {
                    "matchLabels": {"app": "a"},
                    "matchExpressions": [{"key": "part", "operator": "In", "values": ["x", "y"]}],
                },
                "podMetricsEndpoints": [{"port": "admin", "honorLabels": True}],
            },
        },
        {
            "metadata": {"name": "injected", "namespace": "hbm-system"},
            "spec": {
                "namespaceSelector": {"any": True},
                "selector": {"matchLabels": {"injected": "true"}},
                "podMetricsEndpoints": [{"port": "hbm-metrics"}, {"port": "http"}],
            },
        },
        {
            "metadata": {"name": "routers", "namespace": "hbm-system"},
            "spec": {
                "namespaceSelector": {"matchNames": ["models"]},
                "selector": {"matchLabels": {"app": "r"}},
                "podMetricsEndpoints": [
                    {
                        "port": "admin",
                        "relabelings": [
                            {
                                "sourceLabels": ["__meta_kubernetes_pod_label_hbm_io_route"],
                                "targetLabel": "route",
                            }
                        ],
                    }
                ],
            },
        },
    ]
    assert jobs_of(monitors) == [
        Job("operator-0", "admin", "app=a,part in (x,y)", ("hbm-system",), True),
        Job("injected-0", "hbm-metrics", "injected=true"),
        Job("injected-1", "http", "injected=true"),
        Job("routers-0", "admin", "app=r", ("models",), False, {"route": "hbm_io_route"}),
    ]
