"""Grafana dashboards: panels.py what a panel is and how the SDK builds it, dashboards.py the three dashboards,
generate.py writes dashboards/*.json, provisioning/ how Grafana finds them and Prometheus."""
