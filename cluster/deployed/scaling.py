"""When a deployed scorer gets another replica, and when it loses one: by the images it holds, and by nothing else.

wanted = images that all its replicas hold (waiting or being scored, a mean over look_back_s) / target_images. Ray Serve
rounds up, keeps within the bounds and waits out the delays.
Does not own: counting the images (reward_servers.batching).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from contracts.errors import ConfigError

HELD = "images_held"
"""What a replica reports to Serve's autoscaler."""


@dataclass(frozen=True)
class Scaling:
    """min_replicas, max_replicas: bounds; target_images: a replica is meant to hold; up_after_s, down_after_s: how long
    more, or fewer, replicas must be wanted without a break; look_back_s: the mean is over; report_s: between reports.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    target_images: float = 64.0
    up_after_s: float = 10.0
    down_after_s: float = 300.0
    look_back_s: float = 10.0
    report_s: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError("max", f"{self.min_replicas} to {self.max_replicas} replicas", "use 1 <= min <= max")
        if self.target_images <= 0:
            raise ConfigError("target-images", f"{self.target_images:g} images a replica", "use more than 0")

    def autoscaling(self) -> Any:
        """Ray Serve's own configuration of the same."""
        import warnings

        from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

        with warnings.catch_warnings():
            # The variable that will replace metrics_interval_s holds for the whole cluster, not for a deployment.
            warnings.simplefilter("ignore", DeprecationWarning)
            return AutoscalingConfig(
                min_replicas=self.min_replicas, max_replicas=self.max_replicas, upscale_delay_s=self.up_after_s,
                downscale_delay_s=self.down_after_s, look_back_period_s=self.look_back_s,
                metrics_interval_s=self.report_s,
                policy=AutoscalingPolicy(
                    policy_function=ByImagesHeld, policy_kwargs={"target_images": self.target_images}
                ),
            )  # fmt: skip


class ByImagesHeld:
    """The policy. It travels to Serve's controller by value, which need not have Salon on its path."""

    def __init__(self, target_images: float) -> None:
        self.target_images = target_images

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, not yet rounded, and no state; context: ray.serve.config.AutoscalingContext."""
        held = (context.aggregated_metrics or {}).get(HELD, {})
        return sum(held.values()) / self.target_images, {}
