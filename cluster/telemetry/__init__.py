"""What a run tells the outside: metrics, events, TensorBoard, progress, and stacks when nothing moves.

telemetry.py the controller's exporter, built from contracts/metrics.py; sinks.py TensorBoard and other trackers,
each behind a sink_thread.py; appending.py files that only grow, on disks that get full;
trace.py when everybody did what; verdict.py what was waited for and what to scale;
process.py the /metrics of every other process; targets.py where Prometheus finds them all;
rates.py throughput with every GPU counted; progress.py the driver's display; watchdog.py stack dumps.
"""

from cluster.telemetry.telemetry import Telemetry

__all__ = ["Telemetry"]
