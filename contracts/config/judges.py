"""Options of scorers that ask a judge: a vision-language model behind an OpenAI-compatible endpoint.

One section a scorer, found by its registry name in JUDGE_SCORER_OPTIONS; every one adds to JudgeOptions. Does not own:
the deadlines of the run's own client (scoring.py), options of scorers that hold their model themselves (scorers.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from contracts.config.base import Section


class JudgeOptions(Section):
    """Which judge, and how patiently and how often it is asked."""

    urls: tuple[str, ...] = Field(min_length=1, description="servers of one model, without the /v1")
    model: str = Field(min_length=1, description="the model's name on those servers")
    concurrency: int = Field(default=16, gt=0, description="requests in flight to one server")
    timeout_s: float = Field(default=60.0, gt=0, description="one request")
    deadline_s: float = Field(default=120.0, gt=0, description="one question, all attempts together")
    max_retries: int = Field(default=3, ge=0, description="further attempts of one question")
    retry_budget: float = Field(
        default=0.2, ge=0, description="retries and hedges allowed as a share of questions, plus 10"
    )
    breaker_failures: int = Field(default=5, gt=0, description="consecutive failures that open the circuit")
    breaker_reset_s: float = Field(
        default=5.0, gt=0,
        description="seconds an open circuit waits before a probe at the most; before the first an eighth of it, and "
        "twice as long after each that fails",
    )  # fmt: skip
    hedge_quantile: float | None = Field(
        default=0.95, gt=0, lt=1,
        description="another of `urls` is asked too after this quantile of latencies; null, or a lone URL: never",
    )  # fmt: skip
    cache_entries: int = Field(default=4096, ge=0, description="answers kept; 0: none")
    log_probs: Literal["auto", "ids", "top"] = Field(
        default="auto",
        description="ids: logprob_token_ids, exact at any rank (vLLM); top: the 20 best; auto: ids where it works",
    )
    min_mass: float = Field(
        default=0.1, ge=0, le=1, description="probability the possible answers must have together, else undecided"
    )
    dollars_per_million_read: float = Field(default=0.0, ge=0, description="price of prompt tokens")
    dollars_per_million_written: float = Field(default=0.0, ge=0, description="price of completion tokens")
    gpus: float = Field(
        default=1.0, ge=0, description="GPUs one of `urls` occupies; counted in throughput (0: another's, or none)"
    )
    token_env: str = Field(default="SALON_JUDGE_TOKEN", description="environment variable with the judge's API key")

    @field_validator("urls")
    @classmethod
    def _http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an http(s) URL")
            if url.rstrip("/").endswith("/v1"):
                raise ValueError(f"{url!r}: leave out the /v1")
        return tuple(url.rstrip("/") for url in urls)


class VqaScoreOptions(JudgeOptions):
    """VQAScore: the probability of Yes."""

    question: str = Field(
        default='Does this figure show "{prompt}"? Please answer yes or no.',
        description="{prompt} is replaced by the caption",
    )

    @field_validator("question")
    @classmethod
    def _asks_about_the_prompt(cls, question: str) -> str:
        if "{prompt}" not in question:
            raise ValueError("it lacks {prompt}")
        return question


class ScaleOptions(JudgeOptions):
    """The expectation of a 0-9 grade."""

    question: str = Field(
        default='How well does this image show "{prompt}"? Answer with one digit from 0 (not at all) to 9 (perfectly).',
        description="{prompt} is replaced by the caption",
    )


class UnifiedRewardOptions(JudgeOptions):
    """UnifiedReward, or a model that understands its prompts."""

    form: Literal["final", "dimensions"] = Field(
        default="final", description="final: 'Final Score' (v1, v1.5); dimensions: alignment, coherence, style (2.0)"
    )
    max_tokens: int = Field(default=512, gt=0, description="longest answer")


class FormOptions(JudgeOptions):
    """Of scorers whose judge fills in a form: JSON by a schema."""

    max_text: int | None = Field(
        default=None, gt=0,
        description="most characters of each free text of the form (maxLength, which vLLM knows and OpenAI does not), "
        "for judges that run on until they are cut off; null: no bound",
    )  # fmt: skip


class RationalRewardsOptions(FormOptions):
    """RationalRewards, or any judge that can fill in a form."""

    form: Literal["structured", "published"] = Field(
        default="structured", description="structured: JSON by a schema; published: the text the paper's model writes"
    )
    temperature: float = Field(default=0.1, ge=0, description="sampling temperature")
    max_tokens: int = Field(default=2048, gt=0, description="longest answer")
    samples: int = Field(default=1, gt=0, description="answers drawn of one image")
    vote: Literal["mean", "majority"] = Field(
        default="mean",
        description="of `samples`: mean of those that decided, or the reward that more than half gave, else undecided",
    )

    @model_validator(mode="after")
    def _a_vote_has_voters(self) -> RationalRewardsOptions:
        if self.vote == "majority" and (self.samples < 3 or self.temperature == 0):
            raise ValueError("vote: majority wants samples of 3 or more that differ: set samples and a temperature")
        return self

    @property
    def says_how_sure(self) -> bool:
        """One answer alone has no spread."""
        return self.samples > 1


class JudgePairsOptions(JudgeOptions):
    """Preferences between the images of a group, both orders asked."""

    pairs: int | None = Field(
        default=None, ge=1, description="pairs compared a group, then a Bradley-Terry fit; null: all of them"
    )
    answer: Literal["log_probs", "text"] = Field(
        default="log_probs", description="log_probs: of the tokens 1 and 2; text: <answer>Image 1 is better</answer>"
    )
    max_tokens: int = Field(default=2048, gt=0, description="longest answer in text")


class PacoConsistencyOptions(JudgeOptions):
    """Consistency of the panels of one image."""

    rows: int = Field(default=2, gt=0, description="panels down")
    columns: int = Field(default=2, gt=0, description="panels across")
    criteria: tuple[str, ...] = Field(
        default=("identity", "style", "logic"), min_length=1, description="asked one by one of every pair of panels"
    )


class ChecklistOptions(FormOptions):
    """A checklist drawn up from the prompt, then ticked off on the image."""

    max_items: int = Field(default=8, gt=0, le=32, description="most items of a checklist")
    max_tokens: int = Field(default=1024, gt=0, description="longest checklist")


class ChecklistGroupOptions(ChecklistOptions):
    """A checklist whose items weigh by how few of the group pass them (VeRPO)."""

    full_pass: float = Field(
        default=0.2, ge=0, le=1, description="share of the dense reward that only an image that passes all items gets"
    )


class ChoiceOptions(JudgeOptions):
    """The multiple-choice question in a prompt's metadata, its options shuffled."""

    shuffles: int = Field(
        default=2, ge=1, le=10, description="cyclic orders of the options asked, at most as many as there are options"
    )
    reward: Literal["acre", "georeason"] = Field(
        default="acre",
        description="acre: 1 if right in both orders, `partial` in one; georeason: right in the order given, times the "
        "share of the most frequent answer where that is below `threshold`",
    )
    partial: float = Field(default=0.5, ge=0, le=1, description="acre: right in one of both orders")
    threshold: float = Field(default=1.0, gt=0, le=1, description="georeason: share at which an answer is stable")

    @model_validator(mode="after")
    def _acre_compares_two(self) -> ChoiceOptions:
        if self.reward == "acre" and self.shuffles != 2:
            raise ValueError("reward: acre compares two orders; set shuffles: 2, or reward: georeason")
        return self


class RegionJudgeOptions(FormOptions):
    """Boxes with scores, as a map over the image."""

    grid: tuple[int, int] = Field(default=(32, 32), description="height and width of the map")
    signed: bool = Field(default=False, description="map in [-1,1] instead of [0,1]")
    thousandths: bool = Field(default=False, description="the model counts in thousandths of the image, not in pixels")
    max_tokens: int = Field(default=1024, gt=0, description="longest answer")


class ListwiseOptions(FormOptions):
    """All images of a group at once, by a principle in words."""

    principle: str = Field(
        default="Prefer the image that follows the prompt most faithfully; among equals, the better picture.",
        description="what makes an image better; part of the version",
    )
    shuffles: int = Field(default=2, gt=0, description="orders in which the group is shown; the mean counts")
    reward: Literal["score", "rank"] = Field(default="score", description="the judge's marks, or its ranking")
    max_tokens: int = Field(default=2048, gt=0, description="longest answer")


JUDGE_SCORER_OPTIONS: dict[str, type[JudgeOptions]] = {
    "vqascore": VqaScoreOptions,
    "judge_scale": ScaleOptions,
    "unified_reward": UnifiedRewardOptions,
    "rationalrewards": RationalRewardsOptions,
    "judge_pairs": JudgePairsOptions,
    "paco_consistency": PacoConsistencyOptions,
    "judge_checklist": ChecklistOptions,
    "judge_checklist_group": ChecklistGroupOptions,
    "judge_choice": ChoiceOptions,
    "judge_regions": RegionJudgeOptions,
    "judge_listwise": ListwiseOptions,
}
"""Registry name of a scorer that asks a judge -> the options it takes."""
