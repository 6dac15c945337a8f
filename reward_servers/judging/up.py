"""`judge up`: a vLLM server and, in front of it, a scorer that asks it, as one process to start and stop.

The scorer's server becomes ready once vLLM has answered its canary and the scorer has scored its own. While vLLM is
being restarted, /readyz says so and callers wait; nothing is scored by guess.
Does not own: vLLM's life (vllm), the scorer's server (serving).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from contracts.errors import ConfigError
from reward_servers.construct import make_scorer, parse_options
from reward_servers.judging.scorer import JudgeScorer
from reward_servers.judging.vllm import VllmServer, VllmSettings
from reward_servers.serving import serve
from reward_servers.settings import ServerSettings, token_from_environment


def up(
    vllm: VllmSettings,
    scorer_name: str,
    scorer_options: Sequence[str],
    settings: ServerSettings,
    ready_file: str | None = None,
    parent_pid: int | None = None,
) -> None:
    """Serve until SIGTERM. Raises SalonError.

    vLLM's API key is the one in the scorer's `token_env` (SALON_JUDGE_TOKEN), so that others on this machine can ask
    it as well (`judge probe`); a random one where there is none.
    """
    server = VllmServer(vllm)
    scorer = judge_scorer(scorer_name, scorer_options, {"urls": [server.url], "model": vllm.served_name})
    server.token = os.environ.get(scorer.options.token_env) or server.token
    os.environ[scorer.options.token_env] = server.token
    server.meter = scorer.count
    serve(scorer, settings, token_from_environment(), ready_file, parent_pid, beside=server)


def judge_scorer(name: str, options: Sequence[str], fixed: Mapping[str, Any]) -> JudgeScorer[Any]:
    """The scorer, not yet loaded. Raises ConfigError when it asks no judge or an option is ours to set."""
    import json

    taken = sorted(set(fixed) & set(parse_options(options)))
    if taken:
        raise ConfigError("option", f"{', '.join(taken)} is set by `judge up`", "leave it out")
    scorer = make_scorer(name, [*options, *(f"{key}={json.dumps(value)}" for key, value in fixed.items())])
    if not isinstance(scorer, JudgeScorer):
        raise ConfigError("scorer", f"{name} asks no judge", "serve it with `python -m reward_servers serve`")
    return scorer
