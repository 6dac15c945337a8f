"""The three dashboards: what a run learns, how fast and what it waits for, how its jury does.

Series come from contracts/metrics.py alone, shares and their windows from prometheus/rules/recording.yml.
Does not own: how panels look (panels.py).
"""

from __future__ import annotations

from cluster.deploy.grafana.panels import Board, Panel, Query

OF_RUN = 'run=~"$run"'
OF_SCORER = 'run=~"$run", scorer=~"$scorer"'
OF_SERVER = 'run=~"($run)|", scorer=~"$scorer"'
"""Of reward servers and judges: one that serves several runs names none, and is shown with each that has its scorer."""
WINDOW = "[$__rate_interval]"
SHARE = "run_role_phase:salon_phase_seconds_total:share5m"


def _rewards(held_out: int) -> str:
    return (
        f"salon_reward_mean{{{OF_RUN}}} and on (run, scorer) (salon_scorer_held_out{{{OF_RUN}}} == {held_out})"
    )  # fmt: skip


def _quantile(share: float, series: str, labels: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by ({by}, le) (rate({series}_bucket{{{labels}}}{WINDOW})))"


def _quantiles(series: str, labels: str, by: str, legend: str) -> tuple[Query, ...]:
    return tuple(
        Query(_quantile(share, series, labels, by), f"p{round(100 * share)} {legend}") for share in (0.5, 0.9, 0.99)
    )


def _rate(series: str, labels: str, by: str) -> str:
    return f"sum by ({by}) (rate({series}{{{labels}}}{WINDOW}))"


def _cache_hits() -> str:
    """0 where a judge was asked and no answer was in the cache: a series that never grew does not exist."""
    hits, asked = (
        _rate(f"salon_judge_{name}_total", OF_SERVER, "scorer") for name in ("cache_hits", "questions")
    )  # fmt: skip
    return f"({hits} or 0 * {asked}) / {asked}"


def _row(share: str, waiting: str, scale: str) -> Query:
    """A line of the bottleneck table: a share by run, and in words who waits and what would end it."""
    named = f'label_replace(sum by (run) ({share}), "waiting", "{waiting}", "", "")'
    return Query(f'label_replace({named}, "scale", "{scale}", "", "")')


RUN = Board(
    uid="salon-run",
    title="Salon: Run",
    text="What the run learns.",
    variables={"run": "salon_step"},
    panels=(
        Panel(
            "Reward per scorer, held-out ones beside",
            "Mean of each score column over a step. A training scorer that rises while held-out ones fall is being "
            "gamed. The evaluation is the judging column on held-out prompts.",
            (
                Query(_rewards(0), "{{run}} {{scorer}}/{{column}}"),
                Query(_rewards(1), "{{run}} {{scorer}}/{{column}} (held out)"),
                Query(f"salon_eval_score{{{OF_RUN}}}", "{{run}} evaluation ({{split}})"),
            ),
            width=24,
            height=10,
        ),
        Panel(
            "KL",
            "To the reference (kl), over the updates of a step (approx_kl), and in nats from the policy that painted "
            "to the one that learns (stale groups).",
            (
                Query(f'salon_train_metric{{{OF_RUN}, name=~"kl|approx_kl"}}', "{{run}} {{name}}"),
                Query(f"salon_drift_nats{{{OF_RUN}}}", "{{run}} behaviour to proximal"),
            ),
            width=8,
        ),
        Panel(
            "Clip fraction",
            "Share of terms whose ratio is clipped.",
            (Query(f'salon_train_metric{{{OF_RUN}, name=~"(.+_)?clip_fraction"}}', "{{run}} {{name}}"),),
            unit="percentunit",
            width=8,
        ),
        Panel(
            "Effective sample size",
            "Share of the batch that the importance weights leave effective: 1 on-policy.",
            (Query(f"salon_effective_sample_size{{{OF_RUN}}}"),),
            unit="percentunit",
            width=8,
        ),
    ),
)

THROUGHPUT = Board(
    uid="salon-throughput",
    title="Salon: Throughput",
    text="How fast the run is, what it waits for, and what to scale.",
    variables={"run": "salon_step"},
    panels=(
        Panel(
            "Bottleneck",
            "Whoever waits more is not the bottleneck: scale what is named on the line with the larger share.",
            (
                _row(
                    f'{SHARE}{{{OF_RUN}, role="learner", phase="wait_for_groups"}}',
                    "the learner, for groups", "rollout actors or reward servers",
                ),
                _row(
                    f'{SHARE}{{{OF_RUN}, role="actor", phase=~"wait_for_prompt|wait_for_weights"}}',
                    "actors, for prompts or weights", "the learner",
                ),
            ),
            unit="percentunit", kind="table", width=16, height=6,
            columns={"run": "run", "waiting": "who waits", "Value": "share of its time", "scale": "what to scale"},
        ),
        Panel(
            "GPUs counted",
            "All of the run: actors, learner and reward servers (CPU slots where there is no GPU).",
            (Query(f"sum by (run, role) (salon_accelerators{{{OF_RUN}}})", "{{run}} {{role}}"),),
            kind="bars", width=8, height=6,
        ),
        Panel(
            "Images per second",
            "Painted by actors, and trained: in the lineage of the current weights.",
            (
                Query(_rate("salon_images_painted_total", OF_RUN, "run"), "{{run}} painted"),
                Query(_rate("salon_images_trained_total", OF_RUN, "run"), "{{run}} trained"),
            ),
        ),
        Panel(
            "Images per second per GPU, all GPUs counted",
            "Over every GPU of the run; trained images are those of the last minute.",
            (
                Query(
                    _rate("salon_images_painted_total", OF_RUN, "run")
                    + f" / sum by (run) (salon_accelerators{{{OF_RUN}}})",
                    "{{run}} painted",
                ),
                Query(f"salon_images_per_second_per_gpu{{{OF_RUN}}}", "{{run}} trained"),
            ),
        ),
        Panel(
            "Learner: share of wall time by phase",
            "wait_for_groups is time the learner's GPUs stand idle.",
            (Query(f'{SHARE}{{{OF_RUN}, role="learner"}}', "{{run}} {{phase}}"),),
            unit="percentunit", kind="shares",
        ),
        Panel(
            "Actors: share of wall time by phase",
            "wait_for_prompt and wait_for_weights are time the actors' GPUs stand idle.",
            (Query(f'{SHARE}{{{OF_RUN}, role="actor"}}', "{{run}} {{phase}}"),),
            unit="percentunit", kind="shares",
        ),
        Panel(
            "Queue: groups alive against capacity",
            "Groups by state; admission stops at the capacity.",
            (
                Query(f"salon_groups{{{OF_RUN}}}", "{{run}} {{state}}"),
                Query(f"salon_queue_capacity_groups{{{OF_RUN}}}", "{{run}} capacity"),
            ),
            width=8,
        ),
        Panel(
            "Staleness",
            "Steps between a group's weights and its update.",
            (
                Query(f"salon_staleness_largest_steps{{{OF_RUN}}}", "{{run}} largest"),
                Query(
                    _rate("salon_staleness_steps_sum", OF_RUN, "run")
                    + " / " + _rate("salon_staleness_steps_count", OF_RUN, "run"),
                    "{{run}} mean",
                ),
                Query(f"salon_staleness_limit_steps{{{OF_RUN}}}", "{{run}} limit"),
            ),
            width=8,
        ),
        Panel(
            "Weight sync",
            "From the end of a step to weights offered, and load and proof in an actor.",
            (
                Query(_quantile(0.9, "salon_weight_publish_seconds", OF_RUN, "run"), "{{run}} publish p90"),
                Query(_quantile(0.9, "salon_weight_load_seconds", OF_RUN, "run"), "{{run}} load p90"),
            ),
            unit="s", width=8,
        ),
    ),
)  # fmt: skip

JURY = Board(
    uid="salon-jury",
    title="Salon: Jury",
    text="How each scorer does: latency, outcomes, load, replicas.",
    variables={"run": "salon_step", "scorer": 'salon_scorer_held_out{run=~"$run"}'},
    panels=(
        Panel(
            "Latency of a request",
            "From arrival at the server to its answer.",
            _quantiles("salon_reward_request_seconds", OF_SERVER, "scorer", "{{scorer}}"),
            unit="s",
        ),
        Panel(
            "Outcomes",
            "Score entries a second: ok, failed, timed out, undecided. None is ever counted as a score of 0.",
            (Query(_rate("salon_score_outcomes_total", OF_SCORER, "scorer, outcome"), "{{scorer}} {{outcome}}"),),
        ),
        Panel(
            "Queue: images waiting against capacity",
            "Beyond the capacity a server answers 429.",
            (
                Query(f"sum by (scorer) (salon_reward_queue_depth{{{OF_SERVER}}})", "{{scorer}} waiting"),
                Query(f"sum by (scorer) (salon_reward_queue_capacity{{{OF_SERVER}}})", "{{scorer}} capacity"),
            ),
        ),
        Panel(
            "Batch size",
            "Images in one call of the scorer.",
            (
                Query(
                    _rate("salon_reward_batch_images_sum", OF_SERVER, "scorer")
                    + " / " + _rate("salon_reward_batch_images_count", OF_SERVER, "scorer"),
                    "{{scorer}} mean",
                ),
                Query(_quantile(0.9, "salon_reward_batch_images", OF_SERVER, "scorer"), "{{scorer}} p90"),
            ),
        ),
        Panel(
            "Replicas",
            "Servers that answer, and those of them that are ready.",
            (
                Query('sum by (scorer) (up{job="salon", role="reward_server", ' + OF_SERVER + "})", "{{scorer}} up"),
                Query(f"sum by (scorer) (salon_reward_ready{{{OF_SERVER}}})", "{{scorer}} ready"),
            ),
        ),
        Panel(
            "Cache hits",
            "Share of a judge's questions answered from its cache; scorers that ask no judge have no cache.",
            (Query(_cache_hits(), "{{scorer}}"),),
            unit="percentunit",
        ),
        Panel(
            "Learning beside the run: versions and updates",
            "The version in use of a scorer that learns online, and how many updates its trainer makes a learner step.",
            (
                Query(f"salon_online_version{{{OF_SCORER}}}", "{{scorer}} version in use"),
                Query(
                    _rate("salon_online_updates_total", OF_SCORER, "run, scorer") + " / on (run) group_left sum by "
                    f"(run) (deriv(salon_step{{{OF_RUN}}}{WINDOW}) > 0)",
                    "{{scorer}} updates a step",
                ),
            ),
            width=8,
        ),
        Panel(
            "Learning beside the run: copies of groups",
            "Copies a second that its trainer was offered, and those that were dropped because it is slower than the "
            "run. Nothing waits for it.",
            (
                Query(_rate("salon_online_groups_offered_total", OF_SCORER, "scorer"), "{{scorer}} offered"),
                Query(_rate("salon_online_groups_dropped_total", OF_SCORER, "scorer"), "{{scorer}} dropped"),
            ),
            width=8,
        ),
        Panel(
            "Learning beside the run: how well",
            "accuracy: of a discriminator; 0.5: it can no longer tell what is painted from the references. agreement, "
            "coverage: of a distilled scorer with its judge. triggered_share: of groups on which a guarded scorer was "
            "gamed, and learnt.",
            (
                Query(
                    f'salon_online_metric{{{OF_SCORER}, name=~"accuracy|agreement|coverage|triggered_share"}}',
                    "{{scorer}} {{name}}",
                ),
            ),
            unit="percentunit", width=8,
        ),
    ),
)  # fmt: skip

BOARDS = (RUN, THROUGHPUT, JURY)
