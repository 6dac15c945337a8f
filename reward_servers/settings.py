"""Limits and addresses of a reward server, and the rule who may reach it.

Does not own: command-line options (__main__), what the limits do (app, batching).
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from contracts.errors import ConfigError

TOKEN_ENV = "SALON_REWARD_TOKEN"


@dataclass(frozen=True)
class ServerSettings:
    """max_batch: images in one call of the scorer; max_wait_s: how long a lone request waits for company;
    queue: images that may wait before 429; max_images: images a request; max_pixels: height x width of one image;
    max_seconds: longest a request may take, whatever its deadline_s; upload_seconds: longest a body may take to arrive;
    stall_seconds: one call of the scorer after which /livez fails; drain_seconds: longest a stopping server goes on.
    """

    host: str = "127.0.0.1"
    port: int = 0
    max_batch: int = 64
    max_wait_s: float = 0.005
    queue: int = 1024
    max_images: int = 256
    max_pixels: int = 4096 * 4096
    max_body_bytes: int = 512 * 2**20
    max_seconds: float = 300.0
    upload_seconds: float = 60.0
    stall_seconds: float = 300.0
    drain_seconds: float = 30.0

    @property
    def images_per_request(self) -> int:
        """A request must fit into the queue, or it could never be served."""
        return min(self.max_images, self.queue)


def token_from_environment() -> str | None:
    """The bearer token, or None. It is never logged nor shown."""
    return os.environ.get(TOKEN_ENV) or None


def check_reach(settings: ServerSettings, token: str | None) -> None:
    """Raises ConfigError when a server without a token would listen beyond this machine."""
    if token is None and not is_loopback(settings.host):
        raise ConfigError(
            "host", f"{settings.host} is reachable from other machines and no token is set",
            f"set {TOKEN_ENV} on the server and its callers, or use --host 127.0.0.1",
        )  # fmt: skip


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback addresses; any other name counts as reachable from outside."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
