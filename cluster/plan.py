"""The plan `validate` prints: who runs where, how much a step paints, asks and stores, and what it holds in memory.

Worked out from the configuration and the headers of the model's files. Figures that depend on the machine (seconds)
are given only where the configuration itself states them; `describe` is text, `make_plan` the numbers.
Does not own: whether the run can start (validate.py), placement (controller).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, prod
from pathlib import Path

from cluster.checks.declared import Declared, look_up
from cluster.checks.headers import ModelCard, adapted_layers, read_model_card
from cluster.checks.jury import gives_of
from cluster.checks.machines import wanted_cpus, wanted_gpus
from cluster.checks.method import group_size, num_micro_batches, num_stochastic_steps
from cluster.checks.previews import num_previews
from cluster.telemetry.rates import count_accelerators, gpus_a_replica
from contracts.config import RunConfig
from contracts.config.scorers import num_comparisons
from contracts.declarations import ObjectiveNeeds
from contracts.needs import objective_needs
from contracts.scores import ScorerInfo
from contracts.wire import Source

_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Place:
    """Processes of one role. cpus, gpus: reserved by each; memory: bytes each holds, None where unknown."""

    role: str
    number: int
    cpus: float
    gpus: float
    what: str
    memory: int | None = None


@dataclass(frozen=True)
class RunPlan:
    """Numbers of a run. Per step unless the name says otherwise; None where the model's folder is unknown, and of
    reward_requests and comparisons where only a scorer's server could tell and was not asked."""

    places: list[Place]
    source: Source
    groups: int
    images: int
    reward_requests: dict[str, int | None]
    updates: int
    micro_batches: int
    group_bytes: int | None
    weight_bytes: int | None
    live_groups: int
    total_steps: int | None
    total_seconds: float | None
    eval_images: int
    comparisons: dict[str, int | None] = field(default_factory=dict)  # by scorer that compares pairs, or may
    notes: list[str] = field(default_factory=list)


def make_plan(config: RunConfig, infos: Mapping[str, ScorerInfo] | None = None) -> RunPlan:
    """The plan of a configuration that `check` found nothing wrong with.

    infos: what the servers of scorers given by URL said of themselves, by name of the scorer, if they were asked.
    """
    infos = infos or {}
    declared = look_up(config)
    declared = replace(declared, scorers={**declared.scorers, **{name: gives_of(infos[name]) for name in infos}})
    needs = objective_needs(config)
    size, groups = group_size(config, declared), config.rollout.groups_per_step
    card = read_model_card(Path(config.model.path))
    source = _source(declared, needs)
    return RunPlan(
        places=_places(config, needs, card, source), source=source, groups=groups, images=groups * size,
        reward_requests=_requests(config, declared, groups, size, source),
        updates=config.learner.updates_per_step * config.learner.epochs, micro_batches=num_micro_batches(config, needs),
        group_bytes=_group_bytes(config, needs, card, size, source), weight_bytes=_weight_bytes(config, card),
        live_groups=(config.pipeline.max_staleness + 1) * groups, total_steps=config.stop.steps,
        total_seconds=config.stop.seconds, eval_images=config.eval.num_prompts * config.eval.images_per_prompt,
        comparisons=_comparisons(config, declared, infos, groups, size) if source is Source.ACTORS else {},
    )  # fmt: skip


def _source(declared: Declared, needs: ObjectiveNeeds) -> Source:
    if needs.sources == (Source.LEARNER,):
        return Source.LEARNER
    return declared.prompts.source if declared.prompts is not None else Source.ACTORS


def _requests(config: RunConfig, declared: Declared, groups: int, size: int, source: Source) -> dict[str, int | None]:
    """HTTP requests a step, by scorer: a group is asked about on its own, at most max_batch images a request.

    A scorer that needs a group whole gets it in one request; one of previews is sent those of all its steps.
    """
    if source is Source.FILES:
        return {scorer.name: 0 for scorer in config.scorers}
    if source is Source.LEARNER:
        number = ceil(groups * size / config.learner_micro_batch)
        return {scorer.name: 0 if scorer.held_out else number for scorer in config.scorers}
    found: dict[str, int | None] = {}
    for scorer in config.scorers:
        gives = declared.scorers[scorer.name]
        sent = size if scorer.previews is None else size * num_previews(config, [scorer])
        parts = ceil(sent / scorer.max_batch)
        unasked = gives is None and bool(scorer.urls)
        whole = gives is not None and gives.needs_group
        found[scorer.name] = None if unasked and parts > 1 else groups * (1 if whole else parts)
    return found


def _comparisons(
    config: RunConfig, declared: Declared, infos: Mapping[str, ScorerInfo], groups: int, size: int
) -> dict[str, int | None]:
    """Comparisons of two images a step, both orders counted, by scorer of pairs.

    None: a server that has not been asked whether it compares pairs, or does not say how many.
    """
    found: dict[str, int | None] = {}
    for scorer in config.scorers:
        gives, info = declared.scorers[scorer.name], infos.get(scorer.name)
        if gives is None and scorer.urls:
            found[scorer.name] = None
        elif gives is not None and gives.kind == "pair":
            pairs = scorer.options.get("pairs", "all") if info is None else info.pairs
            known = None if pairs == "all" else pairs
            found[scorer.name] = None if pairs is None else groups * num_comparisons(size, known)
    return found


def _group_bytes(
    config: RunConfig, needs: ObjectiveNeeds, card: ModelCard | None, size: int, source: Source
) -> int | None:  # fmt: skip
    """Bytes of a stored group (contracts.wire.GROUP_ARRAYS). Nothing is stored of what the learner paints itself."""
    if card is None:
        return None
    if source is Source.LEARNER:
        return 0
    latent, steps = card.latent[0] * card.latent[1] * card.latent[2], num_stochastic_steps(config)
    stored = size * latent * 4  # clean latents
    if source is Source.ACTORS:
        stored += size * (1 + num_previews(config, config.scorers)) * card.image[0] * card.image[1] * 3
    if needs.states:
        stored += size * (steps + 1) * latent * _BYTES[config.rollout.storage_dtype] + size * steps * 4
    if needs.states and needs.means:
        stored += size * steps * latent * 4
    return stored


def trained_parameters(config: RunConfig, card: ModelCard) -> int:
    """Parameters that train: all of the network's, or the adapter's."""
    if config.model.tuning == "full":
        return card.network
    shapes = adapted_layers(card.layers, config.model.lora).values()
    return sum(config.model.lora.rank * (shape[0] + prod(shape[1:])) for shape in shapes)


def _weight_bytes(config: RunConfig, card: ModelCard | None) -> int | None:
    """Bytes that travel to each node with every published version."""
    return None if card is None else trained_parameters(config, card) * _BYTES[config.model.dtype]


def _places(config: RunConfig, needs: ObjectiveNeeds, card: ModelCard | None, source: Source) -> list[Place]:
    rollout, learner = config.rollout, config.learner
    painting = "evaluates only: the learner paints" if source is Source.LEARNER else "paints groups"
    if source is Source.FILES:
        painting = "encodes pairs from files, evaluates"
    places = [
        Place("driver", 1, 0, 0, "shows progress"),
        Place("controller", 1, 0, 0, "ledger, admission, credit, evaluation"),
        Place("vault", config.vault.count, 0, 0, "keeps groups' bytes", config.vault.memory_mb * 2**20),
        Place("dispatcher", 1, 0, 0, "asks the jury"),
        Place("actor", rollout.actors, rollout.cpus_per_actor, rollout.gpus_per_actor, painting,
              _actor_bytes(config, card)),
        Place("rank", learner.ranks, learner.cpus_per_rank, learner.gpus_per_rank, _engine(config),
              _rank_bytes(config, needs, card)),
    ]  # fmt: skip
    for scorer in config.scorers:
        if scorer.serve:
            places.append(Place("reward server", 1, 0, gpus_a_replica(scorer), f"{scorer.name}: {scorer.serve}"))
        elif scorer.urls:
            places.append(Place("reward server", len(scorer.urls), 0, 0, f"{scorer.name}: {', '.join(scorer.urls)}"))
    places += [
        Place("online trainer", 1, each.cpus, each.gpus, f"{each.scorer}: {each.name}") for each in config.online
    ]
    return places


def _engine(config: RunConfig) -> str:
    stage = f" ZeRO-{config.learner.zero_stage}" if config.learner.engine == "deepspeed" else ""
    return f"{config.objective.name} on {config.learner.engine}{stage}"


def _actor_bytes(config: RunConfig, card: ModelCard | None) -> int | None:
    """Weights of an actor: the whole pipeline in the compute dtype, the VAE in fp32, the adapter."""
    if card is None:
        return None
    width = _BYTES[config.model.dtype]
    rest = sum(number for name, number in card.parameters.items() if name != "vae")
    adapter = trained_parameters(config, card) if config.model.tuning == "lora" else 0
    return (rest + adapter) * width + card.parameters.get("vae", 0) * 4


def _rank_bytes(config: RunConfig, needs: ObjectiveNeeds, card: ModelCard | None) -> int | None:
    """Weights, gradients, fp32 master and AdamW moments, snapshots; shared out by the ZeRO stage. No activations."""
    if card is None:
        return None
    learner, width = config.learner, _BYTES[config.model.dtype]
    trained = trained_parameters(config, card)
    frozen = card.network if config.model.tuning == "lora" else 0
    share = learner.ranks if learner.engine == "deepspeed" else 1
    stage = learner.zero_stage if learner.engine == "deepspeed" else 0
    master = 4 if config.model.dtype == "bf16" else 0
    snapshots = len(needs.snapshots) + (learner.ema is not None)
    total = (frozen + trained) * width / (share if stage >= 3 else 1)
    total += trained * width / (share if stage >= 2 else 1)
    total += trained * (8 + master) / (share if stage >= 1 else 1)
    total += trained * 4 * snapshots / (share if stage >= 3 else 1)
    return int(total)


def describe(
    config: RunConfig, warnings: list[str] | None = None, infos: Mapping[str, ScorerInfo] | None = None
) -> str:
    """The plan as text. infos: as make_plan takes them."""
    plan = make_plan(config, infos)
    lines = [f"run {config.name}: {config.objective.name}, {config.sampler.name} in {config.sampler.steps} steps"]
    lines += ["", "who runs where", *_table(plan.places), _reserved(config)]
    lines += ["", "a step", *_step_lines(config, plan, infos or {})]
    lines += ["", "the run", *_run_lines(config, plan)]
    if warnings:
        lines += ["", "worth a look", *(f"  {warning}" for warning in warnings)]
    return "\n".join(lines)


def _table(places: list[Place]) -> list[str]:
    rows = [("role", "number", "CPUs", "GPUs", "memory", "what it does")]
    rows += [
        (
            p.role,
            str(p.number),
            f"{p.cpus:g}",
            f"{p.gpus:g}",
            "not estimated" if p.memory is None else size_text(p.memory),
            p.what,
        )
        for p in places
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
        for row in rows
    ]


def _reserved(config: RunConfig) -> str:
    where = config.cluster.address or "RAY_ADDRESS, else of a local Ray"
    return (
        f"  each figure is one process's; in all {wanted_cpus(config):g} CPUs, {wanted_gpus(config):g} GPUs of {where}"
    )


def _step_lines(config: RunConfig, plan: RunPlan, asked: Container[str]) -> list[str]:
    """asked: names of scorers whose servers have told what they are."""
    size, previews = plan.images // plan.groups, num_previews(config, config.scorers)
    lines = [
        f"  images         {plan.images} ({plan.groups} groups of {size}), source: {plan.source.value}",
        f"  reward calls   {_by_scorer(plan.reward_requests, asked)}",
        f"  updates        {plan.updates}, over {plan.micro_batches} micro-batches of at most "
        f"{config.learner_micro_batch} rows on {_count(config.learner.ranks, 'rank')}",
    ]
    if previews:
        lines.insert(1, f"  previews       {_count(previews, 'step')} of each image, {plan.images * previews} decoded")
    if plan.comparisons:
        lines.insert(2, f"  comparisons    {_by_scorer(plan.comparisons, asked)} (both orders)")
    if plan.group_bytes is not None and plan.weight_bytes is not None:
        stored = plan.group_bytes * plan.groups
        live = plan.group_bytes * plan.live_groups
        lines += [
            f"  stored         {size_text(stored)} of groups; at most {plan.live_groups} alive: {size_text(live)}",
            f"  weights        {size_text(plan.weight_bytes)} to each node with actors",
        ]
    return lines


def _by_scorer(numbers: Mapping[str, int | None], asked: Container[str]) -> str:
    def told(name: str, number: int | None) -> str:
        unknown = "unknown, as its server does not say" if name in asked else "unknown until the server is asked"
        return f"{name} {unknown if number is None else number}"

    return ", ".join(told(name, number) for name, number in numbers.items())


def _run_lines(config: RunConfig, plan: RunPlan) -> list[str]:
    ends = []
    if plan.total_steps is not None:
        ends.append(f"{plan.total_steps} steps ({plan.total_steps * plan.images} images trained)")
    if plan.total_seconds is not None:
        ends.append(f"{plan.total_seconds:g} s of training")
    evaluations = ("before and " if config.eval.before else "") + "after"
    every = config.eval.every_steps
    middle = f"; {config.eval.during_prompts} prompts every {every} steps" if every else ""
    accelerators = count_accelerators(config, plan.source)
    time = f"{plan.total_seconds:g} s, evaluations not counted" if plan.total_seconds else "not known before it has run"
    return [
        f"  ends after     {' or '.join(ends)}",
        f"  evaluation     {plan.eval_images} images {evaluations}{middle}",
        f"  staleness      at most {_count(config.pipeline.max_staleness, 'step')}"
        + (" (claim_order ready: unbounded)" if config.pipeline.claim_order == "ready" else ""),
        f"  throughput is  per {accelerators.unit}, {accelerators.total:g} in all (actors {accelerators.actors:g}, "
        f"learner {accelerators.learner:g}, reward servers {accelerators.reward_servers:g})",
        f"  time           {time}",
        f"  run folder     {config.runs_dir.rstrip('/')}/{config.name}",
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def size_text(number: float) -> str:
    """Bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
