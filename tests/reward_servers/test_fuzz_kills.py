"""3,000 requests while servers are killed: each is answered once, with its own images' scores or typed failures.

`python -m benchmarks soak jury` does the same with 100,000.
"""

from __future__ import annotations

from benchmarks.jury_soak import soak


def test_3000_requests_through_kills_are_answered_once_each() -> None:
    seen = soak(requests=3000, kills=2, servers=2)
    assert seen.answered == 3000
    assert set(seen.scores) <= {"ok", "failed", "timed_out"}
    assert seen.scores["ok"] > 0.95 * sum(seen.scores.values()), seen
    assert len(seen.recovered_s) == 2
    assert seen.failures, "no request noticed the kills"
    assert seen.megabytes[-1] - seen.megabytes[0] < 20
