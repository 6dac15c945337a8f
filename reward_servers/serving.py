"""The life of a server process: listen, load, become ready, serve, drain on SIGTERM, end.

Invariant: once SIGTERM is received /readyz says no, new scores are refused with 503, and what was accepted is answered
before the process ends (or drain_seconds pass).
Does not own: routes (app), command-line options (__main__), starting this process (client.spawn).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from contracts import stacks
from contracts.errors import ConfigError, SalonError, ScoringError
from reward_servers.app import Service, build_app
from reward_servers.isolation import describe
from reward_servers.memory import keep_freed_memory
from reward_servers.scorers.base import Scorer
from reward_servers.settings import ServerSettings, check_reach


class _Uvicorn(uvicorn.Server):
    """Signals are ours: uvicorn's own handler would close the sockets before the queue is served."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class RewardServer:
    """Serves one scorer until `stop` is called or a signal arrives. Usable from a thread as well (tests)."""

    def __init__(self, scorer: Scorer, settings: ServerSettings, token: str | None) -> None:
        check_reach(settings, token)
        self.settings = settings
        self.socket = _listen(settings.host, settings.port)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self.socket.getsockname()[1]}"
        self._make_service: Callable[[], Service] = lambda: Service(scorer, settings, token)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self.service: Service | None = None

    async def run(self, on_ready: Callable[[RewardServer], None] = lambda server: None) -> None:
        """Serve. on_ready is called once weights are loaded and the canary is scored.

        Raises ScoringError when the scorer does not load.
        """
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        service = self.service = self._make_service()
        config = uvicorn.Config(
            build_app(service), log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5,
            timeout_keep_alive=75, backlog=512,
        )  # fmt: skip
        web = _Uvicorn(config)
        serving = asyncio.create_task(web.serve(sockets=[self.socket]))
        batching = asyncio.create_task(service.batcher.run())
        for task in (serving, batching):  # neither ends by itself: without one of them there is nothing to serve
            task.add_done_callback(lambda _: self.stop())
        try:
            if await self._ready(service, web):
                on_ready(self)
                await self._stop.wait()
                if not batching.done():
                    await service.batcher.drain(self.settings.drain_seconds)
                else:
                    batching.result()
        finally:
            web.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await serving
            batching.cancel()
            service.batcher.close()
            service.scorer.close()

    def stop(self) -> None:
        """Begin to drain; callable from any thread, also when it has ended already."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._stop.set)

    async def _ready(self, service: Service, web: uvicorn.Server) -> bool:
        """Loads while /livez already answers. False when stopped meanwhile."""
        assert self._stop is not None
        loading = asyncio.create_task(service.load())
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not loading.done():
            loading.cancel()
            return False
        try:
            loading.result()
        except SalonError:
            raise
        except Exception as error:
            raise ScoringError(f"scorer {service.scorer.name!r} could not be loaded: {describe(error)}") from error
        while not web.started and not self._stop.is_set():
            await asyncio.sleep(0.005)
        return web.started


def serve(
    scorer: Scorer,
    settings: ServerSettings,
    token: str | None,
    ready_file: str | None,
    parent_pid: int | None,
    beside: contextlib.AbstractAsyncContextManager[Any] | None = None,
) -> None:
    """Serve in this process until SIGTERM or SIGINT. Prints one JSON line when ready. Raises SalonError.

    beside: what the scorer needs to be there: entered before it is loaded, left after it has drained.
    """
    server = RewardServer(scorer, settings, token)

    def announce(ready: RewardServer) -> None:
        line = json.dumps({"url": ready.url, "pid": os.getpid()})
        print(line, flush=True)
        if ready_file is not None:
            with open(f"{ready_file}.tmp", "w") as file:
                file.write(line + "\n")
            os.replace(f"{ready_file}.tmp", ready_file)

    async def main() -> None:
        loop, this = asyncio.get_running_loop(), asyncio.current_task()
        assert this is not None

        def on_signal() -> None:
            if server.service is None:  # not listening yet: what is beside it is still being started
                this.cancel()
            else:
                _on_signal(server, settings.drain_seconds)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        async with beside or contextlib.nullcontext():
            await server.run(announce)

    keep_freed_memory()
    stacks.register(f"reward-{scorer.name}")
    if parent_pid is not None:
        _watch_parent(parent_pid)
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(main())
    _end(0)


def _on_signal(server: RewardServer, drain_seconds: float) -> None:
    """Drain; should a hanging scorer prevent that, end all the same."""
    server.stop()
    timer = threading.Timer(drain_seconds + 10, _end, args=(1,))
    timer.daemon = True
    timer.start()


def _end(status: int) -> None:
    """Leave without joining the scorer's thread, which may hang for ever in foreign code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _watch_parent(parent_pid: int) -> None:
    """Ends this process when its parent has gone, so that no server outlives the run that started it."""

    def watch() -> None:
        waiting = threading.Event()
        while os.getppid() == parent_pid:
            waiting.wait(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named asyncio turns Nagle's algorithm off; with 0 an answer's body waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            "port", f"cannot listen on {host}:{port} ({error.strerror})", "choose another, or 0"
        ) from error
    return listener
