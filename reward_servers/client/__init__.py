"""The jury as the rest of Salon sees it: ask for scores, get a typed table, whatever happens on the way.

RewardClient      asynchronous, HTTP, replicas, retries, circuit breakers
SyncRewardClient  the same for a caller without an event loop
score_steps       previews of a trajectory, scored by any of the above, as a step table
FunctionScorer    a plain Python function behind the same `score`
ServerProcess     starts `python -m reward_servers serve` as a child and never leaves it behind

Imports nothing of the server: httpx, tenacity, numpy and contracts only.
"""

from reward_servers.client.client import RewardClient
from reward_servers.client.function import FunctionScorer
from reward_servers.client.spawn import ServerProcess
from reward_servers.client.stats import ClientStats
from reward_servers.client.steps import score_steps
from reward_servers.client.sync import SyncRewardClient

__all__ = ["ClientStats", "FunctionScorer", "RewardClient", "ServerProcess", "SyncRewardClient", "score_steps"]
