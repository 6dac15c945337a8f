"""How a run is watched and deployed: Prometheus, Grafana, Kubernetes; and the offline check of all of it.

prometheus/ scrape configuration, recording and alert rules with their unit tests; grafana/ dashboards and what
generates them; k8s/ manifests; check.py `make ops-check`. Images and the compose file stand in docker/.
Does not own: series (contracts/metrics.py), exporters (cluster/telemetry, reward_servers/telemetry.py).
"""
