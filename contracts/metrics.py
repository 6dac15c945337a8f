"""The one catalogue of metrics (law 9): every Prometheus series and every key of metrics.jsonl is named here.

One prefix (`salon_`), base units (seconds, bytes), `_total` for counters. Components register the series they own
from here (cluster/telemetry and reward_servers/telemetry); a name that is not here cannot be exported.
Does not own: prometheus_client (it is no dependency of contracts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)


@dataclass(frozen=True)
class Metric:
    """One series. role: the process that exports it; labels beside `run`, which the controller's all carry."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    role: Literal["controller", "process", "reward_server", "judge"]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _controller(name: str, type_: str, help_: str, *labels: str, buckets: tuple[float, ...] = ()) -> Metric:
    return Metric(f"salon_{name}", type_, help_, "controller", ("run", *labels), buckets)  # type: ignore[arg-type]


def _server(name: str, type_: str, help_: str, *labels: str, buckets: tuple[float, ...] = ()) -> Metric:
    return Metric(f"salon_{name}", type_, help_, "reward_server", ("scorer", *labels), buckets)  # type: ignore[arg-type]


def _judge(name: str, type_: str, help_: str, *labels: str, buckets: tuple[float, ...] = ()) -> Metric:
    """Series of a reward server whose scorer asks a judge."""
    return Metric(f"salon_judge_{name}", type_, help_, "judge", ("scorer", *labels), buckets)  # type: ignore[arg-type]


def _process(name: str, type_: str, help_: str) -> Metric:
    """Series of every process of a run; run, role and process are labels of the target (cluster/telemetry/targets)."""
    return Metric(f"salon_process_{name}", type_, help_, "process")  # type: ignore[arg-type]


CATALOGUE: tuple[Metric, ...] = (
    _controller("step", "gauge", "Learner steps finished."),
    _controller("images_painted_total", "counter", "Images painted by actors (or the learner, or read from files)."),
    _controller("images_trained_total", "counter", "Images in the lineage of the current weights."),
    _controller("images_discarded_total", "counter", "Images discarded, by reason.", "reason"),
    _controller("groups", "gauge", "Groups alive, by state.", "state"),
    _controller("queue_capacity_groups", "gauge", "Groups that may be alive at once."),
    _controller("accelerators", "gauge", "GPUs of the run by role (CPU slots where there is no GPU).", "role"),
    _controller("training", "gauge", "1 while the loops run; 0 before and after."),
    _controller("weight_version", "gauge", "Latest published weight version."),
    _controller("staleness_steps", "histogram", "Steps between a trained group's weights and its update.",
                buckets=(0.0, 1.0, 2.0, 3.0, 4.0, 8.0, 16.0)),
    _controller("staleness_largest_steps", "gauge", "Largest staleness among the last step's groups."),
    _controller("staleness_limit_steps", "gauge", "pipeline.max_staleness: the bound of the above."),
    _controller("images_per_second", "gauge", "Trained images a second over the last minute."),
    _controller("images_per_second_per_gpu", "gauge", "The same over all GPUs of the run: actors, learner and reward "
                "servers counted (CPU slots where there is no GPU)."),
    _controller("phase_seconds_total", "counter", "Wall time by role and phase.", "role", "phase"),
    _controller("paint_seconds", "histogram", "Painting of one group.", "actor", buckets=SECONDS_BUCKETS),
    _controller("score_seconds", "histogram", "Scoring of one group, by scorer.", "scorer", buckets=SECONDS_BUCKETS),
    _controller("update_seconds", "histogram", "One learner step.", buckets=SECONDS_BUCKETS),
    _controller("weight_publish_seconds", "histogram", "From the end of a step to weights offered.",
                buckets=SECONDS_BUCKETS),
    _controller("weight_load_seconds", "histogram", "Load and proof of weights in an actor.", "actor",
                buckets=SECONDS_BUCKETS),
    _controller("weight_unproven_total", "counter", "Loads whose digest or canary contradicted the publication.",
                "actor"),
    _controller("score_outcomes_total", "counter", "Score entries by scorer and outcome.", "scorer", "outcome"),
    _controller("score_retries_total", "counter", "Requests repeated.", "scorer"),
    _controller("breaker_open", "gauge", "1 while the circuit to a scorer is open.", "scorer"),
    _controller("reward_mean", "gauge", "Mean of a score column over the last step.", "scorer", "column"),
    _controller("reward_std", "gauge", "Standard deviation of the same.", "scorer", "column"),
    _controller("scorer_held_out", "gauge", "1 for a scorer that judges and does not train, else 0.", "scorer"),
    _controller("online_version", "gauge", "Number of the version in use of a scorer that learns online.", "scorer"),
    _controller("online_updates_total", "counter", "Updates of an online reward model.", "scorer"),
    _controller("online_groups_offered_total", "counter", "Copies of groups offered to an online reward model.",
                "scorer"),
    _controller("online_groups_dropped_total", "counter", "Those that found no place, or whose bytes were gone.",
                "scorer"),
    _controller("online_metric", "gauge", "A figure of an online reward model (loss, accuracy, agreement, ...).",
                "scorer", "name"),
    _controller("eval_score", "gauge", "Mean of the judging column over held-out prompts.", "split"),
    _controller("train_metric", "gauge", "A metric of the objective (loss, kl, clip_fraction, ...).", "name"),
    _controller("log_prob_mismatch", "gauge", "Mean |ratio - 1| before the first update of a step."),
    _controller("effective_sample_size", "gauge", "Share of the batch that the importance weights leave effective."),
    _controller("drift_nats", "gauge", "Mean KL from behaviour to proximal policy a step, in nats."),
    _controller("guard_warnings_total", "counter", "Warnings of a guard that began.", "guard"),
    _controller("actor_restarts_total", "counter", "Actors restarted.", "actor"),
    _controller("learner_rebuilds_total", "counter", "Times all learner ranks were rebuilt.", "reason"),
    _controller("lease_expired_total", "counter", "Leases that expired, by state.", "state"),
    _controller("vault_bytes", "gauge", "Bytes held by vaults.", "where"),
    _controller("process_memory_bytes", "gauge", "Resident memory of a process of the run.", "process"),
    _controller("checkpoint_seconds", "histogram", "A checkpoint of the whole run, from its begin to its end.",
                buckets=SECONDS_BUCKETS),
    _controller("checkpoint_stall_seconds", "histogram", "What a checkpoint took from the learner's step.",
                buckets=SECONDS_BUCKETS),
    _controller("sink_rows_lost_total", "counter", "Rows and pictures that a tracker, or a file of the run, did not "
                "take.", "sink"),
    _controller("checkpoint_failures_total", "counter", "Checkpoints that could not be written."),
    _process("cpu_seconds_total", "counter", "User and system CPU time spent."),
    _process("resident_memory_bytes", "gauge", "Resident memory."),
    _process("virtual_memory_bytes", "gauge", "Virtual memory."),
    _process("start_time_seconds", "gauge", "Start of the process since the epoch."),
    _process("open_fds", "gauge", "Open file descriptors."),
    _process("max_fds", "gauge", "Open file descriptors allowed."),
    _server("reward_requests_total", "counter", "Requests by HTTP status.", "status"),
    _server("reward_images_total", "counter", "Images answered, by outcome.", "outcome"),
    _server("reward_request_seconds", "histogram", "A request from arrival to answer.", buckets=SECONDS_BUCKETS),
    _server("reward_batch_images", "histogram", "Images in one call of the scorer.", buckets=BATCH_BUCKETS),
    _server("reward_scorer_seconds", "histogram", "One call of the scorer.", buckets=SECONDS_BUCKETS),
    _server("reward_queue_depth", "gauge", "Images waiting for the scorer."),
    _server("reward_queue_capacity", "gauge", "Images that may wait before 429 is answered."),
    _judge("questions_total", "counter", "Questions put to the judge, by how they ended (ok, undecided, failed, "
           "timed_out).", "protocol", "outcome"),
    _judge("requests_total", "counter", "Requests sent to judge endpoints, retries and hedges included."),
    _judge("request_failures_total", "counter", "Failed requests to judge endpoints, by cause.", "cause"),
    _judge("retries_total", "counter", "Requests repeated after a failure."),
    _judge("hedges_total", "counter", "Second requests sent beside slow first ones."),
    _judge("cache_hits_total", "counter", "Questions answered from the cache."),
    _judge("tokens_total", "counter", "Tokens the judge read and wrote.", "direction"),
    _judge("cost_dollars_total", "counter", "Price of those tokens, by the prices configured."),
    _judge("flips_total", "counter", "Pairs on which the judge changed its mind with the order."),
    _judge("pairs_total", "counter", "Pairs that the judge decided in both orders."),
    _judge("restarts_total", "counter", "Times the vLLM server behind this scorer was restarted."),
    _judge("answer_seconds", "histogram", "One question, from asking to the answer, retries included.",
           buckets=SECONDS_BUCKETS),
    _server("reward_ready", "gauge", "1 when weights are loaded, the canary is scored and the queue is not full."),
)  # fmt: skip

BY_NAME = {metric.name: metric for metric in CATALOGUE}

_OF_TRAJECTORY = (
    "policy_loss", "ratio_deviation", "clip_fraction", "approx_kl", "effective_sample_size", "log_prob_mismatch",
    "drift_nats", "kept_fraction", "kl",
)  # fmt: skip
_OF_REWARDS = ("valid_fraction", "reward", "reward_std", "reward_std_within_group", "constant_group_fraction")

STEP_METRICS: dict[tuple[str, str], tuple[str, ...]] = {
    ("engine", "any"): ("loss", "grad_norm", "lr"),
    ("objective", "grpo"): _OF_TRAJECTORY,
    ("objective", "ppo"): (*_OF_TRAJECTORY, "value_loss", "value", "value_clip_fraction"),
    ("objective", "nft"): ("policy_loss", "positive_loss", "negative_loss", "optimality", "old_distance", "kl"),
    ("objective", "dpo"): (
        "policy_loss", "implicit_margin", "implicit_accuracy", "winner_excess_error", "loser_excess_error",
    ),
    ("objective", "alignprop"): ("reward", "failed_fraction", "image_gradient_norm"),
    ("credit", "group"): _OF_REWARDS,
    ("credit", "gae"): (*_OF_REWARDS, "value_error", "explained_variance"),
    ("aggregation", "pareto"): ("pareto_front_fraction",),
    ("aggregation", "constrained"): ("multiplier/",),
    ("aggregation", "log_tame"): ("tamed/",),
    ("aggregation", "trust"): ("judge_coef", "judge_trust"),
    ("aggregation", "confidence_mix"): ("model_reward_mean", "model_reward_std"),
    ("aggregation", "uncertainty"): ("score_uncertainty",),
}  # fmt: skip
"""(kind, name) of a plug-in -> what it may measure of a learner step, by the names of train_metric (or of a series of
their own). One that ends in / is followed by scorer/column. Plug-ins that are not here measure nothing."""
