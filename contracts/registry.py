"""Every plug-in of Salon as a row: kind, name, where it stands, which paper it comes from, what it needs or gives.

Targets are strings ("policy.samplers.flow_sde:FlowSDE"), so listing imports nothing. A user's own class is named the
same way in the configuration ("my_module:MyScorer") and is found in the working directory: no fork, no entry here.
To add a method: one file in the kind's folder, one row here, one config variant.

Does not own: what a kind's class must offer (each folder's base.py), configuration variants (config/).
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from contracts.declarations import (
    AggregationNeeds,
    CreditGives,
    Declaration,
    ObjectiveNeeds,
    PromptsGive,
    SamplerGives,
    ScorerGives,
)
from contracts.errors import RegistryError
from contracts.wire import Source

Kind = Literal["family", "sampler", "objective", "credit", "aggregation", "guard", "engine", "scorer", "prompts"]


@dataclass(frozen=True)
class Entry:
    """One plug-in. slugs name catalogue entries (may be empty); paper is a title, 'standard' or 'Salon'."""

    kind: Kind
    name: str
    target: str
    paper: str
    summary: str
    slugs: tuple[str, ...] = ()
    declares: Declaration = None

    @property
    def file(self) -> str:
        """Path of the module that holds it, relative to the repository root."""
        return self.target.split(":")[0].replace(".", "/") + ".py"

    def row(self) -> dict[str, Any]:
        """The row `python -m cluster methods --json` prints."""
        return {
            "kind": self.kind, "name": self.name, "slugs": list(self.slugs), "paper": self.paper, "file": self.file,
            "summary": self.summary,
        }  # fmt: skip


FLOW_GRPO = "Flow-GRPO: Training Flow Matching Models via Online RL (2505.05470)"

ENTRIES: tuple[Entry, ...] = (
    Entry("family", "sd3", "policy.families.sd3:SD3Family", "Scaling Rectified Flow Transformers (2403.03206)",
          "SD3, SD3.5 and the playground's small model: a diffusers StableDiffusion3Pipeline folder"),
    Entry("sampler", "ode", "policy.samplers.ode:ODE", "standard", "Euler step of the flow ODE, deterministic",
          ("ode-ddim",), SamplerGives(log_probs=False)),
    Entry("sampler", "flow_sde", "policy.samplers.flow_sde:FlowSDE", FLOW_GRPO,
          "reverse SDE with sigma = a sqrt(s/(1-s)): stochastic steps with a log-prob",
          ("flow-sde",), SamplerGives(log_probs=True, gaussian_density=True, params=("noise_level",))),
    Entry("sampler", "dance_sde", "policy.samplers.dance_sde:DanceSDE", "DanceGRPO (2505.07818)",
          "reverse SDE with a constant diffusion coefficient",
          ("dance-sde",), SamplerGives(log_probs=True, gaussian_density=True, params=("noise_level",))),
    Entry("sampler", "cps", "policy.samplers.cps:CPS", "Coefficients-Preserving Sampling (2509.05952)",
          "flow step that keeps the total noise level: clean images at few steps",
          ("cps",), SamplerGives(log_probs=True, gaussian_density=True, params=("noise_level",))),
    Entry("objective", "grpo", "learner.objectives.grpo:GRPO", FLOW_GRPO,
          "clipped policy gradient on the recorded steps with group-relative advantages", ("grpo",),
          ObjectiveNeeds(states=True, log_probs=True)),
    Entry("objective", "ppo", "learner.objectives.ppo:PPO", "PPO (1707.06347), DDPO (2305.13301)",
          "clipped policy gradient with a learned value of every denoising state", ("ddpo-ppo",),
          ObjectiveNeeds(states=True, log_probs=True, critic=True)),
    Entry("objective", "nft", "learner.objectives.nft:NFT", "DiffusionNFT (2509.16117)",
          "flow matching on own samples, towards good ones and away from bad ones, around an EMA policy", ("nft",),
          ObjectiveNeeds(clean=True, snapshots=("old",), guidance="none", paints_with="sampling")),
    Entry("objective", "dpo", "learner.objectives.dpo:DPO", "Diffusion-DPO (2311.12908)",
          "preference pairs, best against worst of a group or read from files", ("diffusion-dpo",),
          ObjectiveNeeds(unit="pair", clean=True, snapshots=("ref",), guidance="none",
                         sources=(Source.ACTORS, Source.FILES))),
    Entry("objective", "alignprop", "learner.objectives.alignprop:AlignProp", "AlignProp (2310.03739)",
          "back-propagates a differentiable reward through the last sampling steps", ("alignprop",),
          ObjectiveNeeds(reward_gradient=True, sources=(Source.LEARNER,))),
    Entry("credit", "group", "learner.credit.group:GroupAdvantage", FLOW_GRPO,
          "reward minus the group's mean, over the group's or the batch's standard deviation", ("grpo",),
          CreditGives()),
    Entry("credit", "gae", "learner.credit.gae:GAE", "High-Dimensional Continuous Control Using GAE (1506.02438)",
          "generalised advantage estimation along the recorded denoising steps", ("ddpo-ppo",),
          CreditGives(shape="step", needs_values=True)),
    Entry("aggregation", "weighted_sum", "learner.credit.aggregation.weighted_sum:WeightedSum", "standard",
          "sum of the columns that count, with the scorers' weights", (), AggregationNeeds(kinds=("point",))),
    Entry("aggregation", "gdpo", "learner.credit.aggregation.gdpo:GDPO",
          "GDPO: Group reward-Decoupled Normalization (2601.05242)",
          "each reward normalised within its group by itself, then the weighted sum, whitened over the batch",
          ("gdpo",), AggregationNeeds(std=("global", "none"), critic="never")),
    Entry("aggregation", "pareto", "learner.credit.aggregation.pareto:Pareto",
          "Parrot: Pareto-optimal Multi-Reward RL (2401.05675)",
          "samples that no other beats in every reward are trained on, the others not at all",
          ("parrot",), AggregationNeeds(std=("none",), critic="never", scales=True)),
    Entry("aggregation", "constrained", "learner.credit.aggregation.constrained:Constrained",
          "Confronting Reward Model Overoptimization with Constrained RLHF (2310.04373)",
          "Lagrange multipliers hold each reward at the point beyond which it stops being useful",
          ("constrained-rlhf",), AggregationNeeds(columns="named", std=("none",), critic="never")),
    Entry("aggregation", "base_and_bonus", "learner.credit.aggregation.base_and_bonus:BaseAndBonus",
          "Trust Your Critic: FIRM (2603.12247)",
          "a bonus that multiplies the base, so that a secondary quality cannot buy off a failed primary one",
          ("firm",), AggregationNeeds(columns="named")),
    Entry("aggregation", "log_tame", "learner.credit.aggregation.log_tame:LogTame", "PaCo-RL (2512.04784)",
          "weighted sum in which rewards of great variability go through log(1 + r)",
          ("paco-rl",), AggregationNeeds()),
    Entry("aggregation", "gates", "learner.credit.aggregation.gates:Gates",
          "Stabilizing Long-term Multi-turn RL with Gated Rewards (2508.10548)",
          "rewards in order of priority: a later one counts only where the earlier ones pass",
          ("g-ra",), AggregationNeeds(columns="named")),
    Entry("aggregation", "trust", "learner.credit.aggregation.trust:Trust", "SophiaVL-R1, Trust-GRPO (2505.17018)",
          "a soft judge beside a verifier, weighted by how well it ranks what the verifier knows, and annealed",
          ("sophiavl",), AggregationNeeds(columns="named")),
    Entry("aggregation", "confidence_mix", "learner.credit.aggregation.confidence_mix:ConfidenceMix",
          "Beyond Monolithic Rewards: HARMO (2510.05283)",
          "a rule as far as it is confident, a learned reward for the rest; adherence and a length penalty",
          ("harmo",), AggregationNeeds(columns="named")),
    Entry("aggregation", "win_rate", "learner.credit.aggregation.win_rate:WinRate", "Pref-GRPO (2508.20751)",
          "share of the group that a sample beats, from a pairwise judge or from point scores with ties",
          ("pref-grpo",), AggregationNeeds(critic="never")),
    Entry("aggregation", "uncertainty", "learner.credit.aggregation.uncertainty:Uncertainty",
          "Ctrl-U (2410.11236), PrefPaint (2410.21966)",
          "weighted sum whose advantages count less where the scorers are unsure",
          ("prefpaint", "ctrl-u"), AggregationNeeds(uncertainty=True, kinds=("point",), scales=True)),
    Entry("aggregation", "directional", "learner.credit.aggregation.directional:Directional",
          "D2-Align: Directional Decoupling Alignment (2512.24146)",
          "a reward corrected along a learned direction of its text embedding, against preference mode collapse",
          ("d2-align",), AggregationNeeds(columns="named")),
    Entry("aggregation", "ppr_renorm", "learner.credit.aggregation.ppr_renorm:PPRRenorm",
          "Hybrid Reward Normalization, PPR (2509.25598)",
          "a reward for each step whose sign follows the final outcome",
          ("ppr-renorm",), AggregationNeeds(kinds=("point", "pair", "step"), columns="named", critic="always")),
    Entry("guard", "limit", "learner.guards.limit:Limit", "standard",
          "a metric of the step that stays above or below a limit"),
    Entry("guard", "held_out_divergence", "learner.guards.held_out_divergence:HeldOutDivergence",
          "Scaling Laws for Reward Model Overoptimization (2210.10760)",
          "the training reward rises while a held-out scorer falls: reward hacking"),
    Entry("engine", "plain", "learner.engines.plain:PlainEngine", "standard", "torch AdamW, DDP over several ranks"),
    Entry("engine", "deepspeed", "learner.engines.deepspeed:DeepSpeedEngine", "ZeRO (1910.02054)",
          "DeepSpeed ZeRO stages 0 to 3"),
    Entry("scorer", "playground_verifier", "reward_servers.scorers.playground_verifier:PlaygroundVerifier", "Salon",
          "the playground's exact verifier: strict, dense and their mean", (),
          ScorerGives(columns=("reward", "strict", "dense"), metadata_keys=("playground",))),
    Entry("scorer", "playground_cnn", "reward_servers.scorers.playground_cnn:PlaygroundCNN", "Salon",
          "a small CNN fitted to the verifier's dense score, with gradients", (),
          ScorerGives(columns=("score",), gradients=True, metadata_keys=("playground",))),
    Entry("scorer", "jpeg_size", "reward_servers.scorers.jpeg_size:JpegSize", "DDPO (2305.13301)",
          "size of the JPEG-compressed image in kilobytes: compressibility with a negative weight", ("ddpo-ppo",),
          ScorerGives(columns=("kilobytes",))),
    Entry("scorer", "colourfulness", "reward_servers.scorers.colourfulness:Colourfulness",
          "Measuring colourfulness in natural images (Hasler and Suesstrunk, 2003)",
          "opponent-colour colourfulness of the image", (), ScorerGives(columns=("colourfulness",))),
    Entry("scorer", "vqascore", "reward_servers.scorers.vqascore:VqaScore",
          "Evaluating Text-to-Visual Generation with Image-to-Text Generation (VQAScore, 2404.01291)",
          "probability of Yes to whether the image shows the prompt, by a judge", (),
          ScorerGives(columns=("vqascore", "p_yes"))),
    Entry("scorer", "judge_scale", "reward_servers.scorers.judge_scale:JudgeScale",
          "G-Eval: NLG Evaluation using GPT-4 with Better Human Alignment (2303.16634)",
          "a judge's grade from 0 to 9 as an expectation over the digit's probabilities", (),
          ScorerGives(uncertainty=True)),
    Entry("scorer", "unified_reward", "reward_servers.scorers.unified_reward:UnifiedReward",
          "Unified Reward Model for Multimodal Understanding and Generation (2503.05236)",
          "UnifiedReward's grade in words, by a judge", (), ScorerGives()),
    Entry("scorer", "rationalrewards", "reward_servers.scorers.rationalrewards:RationalRewards",
          "RationalRewards: Reasoning Rewards Scale Visual Generation Both Training and Test Time",
          "aspects with a critique before each score, by a judge", ("rationalrewards",),
          ScorerGives(columns=("reward",), uncertainty=True)),
    Entry("scorer", "paco_consistency", "reward_servers.scorers.paco_consistency:PacoConsistency",
          "PaCo-RL: Advancing Reinforcement Learning for Consistent Image Generation with Pairwise Reward Modeling",
          "consistency of the panels of one image, pair by pair, by a judge", ("paco-rl",),
          ScorerGives(columns=("consistency",))),
    Entry("scorer", "judge_checklist", "reward_servers.scorers.judge_checklist:JudgeChecklist",
          "Trust Your Critic: FIRM (2603.12247)",
          "a checklist drawn up from the prompt and ticked off on the image, by a judge", ("firm",),
          ScorerGives(columns=("following", "all"))),
    Entry("scorer", "judge_checklist_group", "reward_servers.scorers.judge_checklist_group:JudgeChecklistGroup",
          "VeRPO: Verifiable Dense Reward Policy Optimization",
          "a checklist ticked off on a group, items weighted by how few pass them, by a judge", ("verpo",),
          ScorerGives(columns=("dense", "all"), whole_group=True)),
    Entry("scorer", "judge_choice", "reward_servers.scorers.judge_choice:JudgeChoice",
          "Answer-Consistent Chain-of-Thought RL for Multimodal LLMs (ACRE, 2510.10104)",
          "a multiple-choice question about the image, right under shuffled options, by a judge", ("acre", "georeason"),
          ScorerGives(columns=("reward", "agreement", "flips"), metadata_keys=("choice",))),
    Entry("scorer", "judge_regions", "reward_servers.scorers.judge_regions:JudgeRegions",
          "SRUM: Fine-Grained Self-Rewarding for Unified Multimodal Models (2510.12784)",
          "boxes with scores as a map over the image, by a judge", ("srum",),
          ScorerGives(kind="region", columns=("worth",))),
    Entry("scorer", "clip", "reward_servers.scorers.clip:Clip",
          "Learning Transferable Visual Models From Natural Language Supervision (2103.00020)",
          "cosine of image and prompt by any CLIP, with gradients", (),
          ScorerGives(columns=("cosine",), gradients=True)),
    Entry("scorer", "clip_goal", "reward_servers.scorers.clip_goal:ClipGoal",
          "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning (2310.12921)",
          "CLIP towards a goal text, freed of directions that a baseline text does not share", ("vlm-rm",),
          ScorerGives(columns=("reward",), gradients=True)),
    Entry("scorer", "pickscore", "reward_servers.scorers.pickscore:PickScore",
          "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation (2305.01569)",
          "human preference by a fine-tuned CLIP-H, about 15 to 25, with gradients", (),
          ScorerGives(gradients=True)),
    Entry("scorer", "pickscore_pairs", "reward_servers.scorers.pickscore_pairs:PickScorePairs",
          "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation (2305.01569)",
          "PickScore's preference between the images of a group, as a table of pairs", ("pref-grpo",),
          ScorerGives(kind="pair", columns=("wins",))),
    Entry("scorer", "trained", "reward_servers.scorers.trained:Trained",
          "Learning to summarize from human feedback (2009.01325)",
          "a reward model that `python -m reward_servers train` made, its references' mean at 0, with gradients",
          ("summarize-feedback", "secrets-rlhf-2", "solireward", "prefpaint"),
          ScorerGives(gradients=True, uncertainty=True)),
    Entry("scorer", "hpsv2", "reward_servers.scorers.hpsv2:HPSv2", "Human Preference Score v2 (2306.09341)",
          "human preference by a fine-tuned CLIP-H (v2 or v2.1 weights), about 0.2 to 0.35, with gradients", (),
          ScorerGives(gradients=True)),
    Entry("scorer", "imagereward", "reward_servers.scorers.imagereward:ImageReward",
          "ImageReward: Learning and Evaluating Human Preferences (2304.05977)",
          "human preference by BLIP and a linear head, about -2 to 2, with gradients", (),
          ScorerGives(gradients=True)),
    Entry("scorer", "aesthetic", "reward_servers.scorers.aesthetic:Aesthetic",
          "LAION-5B (2210.08402), improved aesthetic predictor",
          "LAION's linear head on CLIP-L, about 1 to 10, with gradients", (), ScorerGives(gradients=True)),
    Entry("scorer", "siglip", "reward_servers.scorers.siglip:Siglip",
          "Sigmoid Loss for Language Image Pre-Training (2303.15343)",
          "cosine of image and prompt and the probability that they match, with gradients", (),
          ScorerGives(columns=("cosine", "probability"), gradients=True)),
    Entry("scorer", "dino_similarity", "reward_servers.scorers.dino_similarity:DinoSimilarity",
          "DINOv2 (2304.07193), DreamBooth (2208.12242)", "likeness to a reference image, with gradients", (),
          ScorerGives(columns=("cosine",), gradients=True, metadata_keys=("reference",))),
    Entry("scorer", "consistency", "reward_servers.scorers.consistency:Consistency",
          "PaCo-RL: Advancing Reinforcement Learning for Consistent Image Generation with Pairwise Reward Modeling",
          "how well an image fits the others of its group (DINO features)", ("paco-rl",),
          ScorerGives(columns=("consistency",), whole_group=True)),
    Entry("scorer", "ocr", "reward_servers.scorers.ocr:Ocr", FLOW_GRPO,
          "edit distance of the text in the image to the text asked for", (), ScorerGives(columns=("likeness",))),
    Entry("scorer", "geneval", "reward_servers.scorers.geneval:Geneval",
          "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment (2310.11513)",
          "objects, counts, colours and positions by a detector and CLIP: GenEval's six tasks", (),
          ScorerGives(columns=("correct", "fraction"), metadata_keys=("tag", "include"))),
    Entry("scorer", "geneval_regions", "reward_servers.scorers.geneval_regions:GenevalRegions",
          "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment (2310.11513)",
          "GenEval's verdict in space: +1 where an object is right, -1 where it is wrong", ("text2grad",),
          ScorerGives(kind="region", columns=("verdict",), metadata_keys=("tag", "include"))),
    Entry("scorer", "attrictrl", "reward_servers.scorers.attrictrl:AttriCtrl",
          "AttriCtrl: Fine-Grained Control of Aesthetic Attribute Intensity in Diffusion Models",
          "brightness (mean HSV value) and detail (entropy of the grey histogram)", ("attrictrl",),
          ScorerGives(columns=("brightness", "detail"))),
    Entry("scorer", "attrictrl_clip", "reward_servers.scorers.attrictrl_clip:AttriCtrlClip",
          "AttriCtrl: Fine-Grained Control of Aesthetic Attribute Intensity in Diffusion Models",
          "realism and safety by CLIP, with gradients", ("attrictrl",),
          ScorerGives(columns=("realism", "safety"), gradients=True)),
    Entry("scorer", "attrictrl_target", "reward_servers.scorers.attrictrl_target:AttriCtrlTarget",
          "AttriCtrl: Fine-Grained Control of Aesthetic Attribute Intensity in Diffusion Models",
          "closeness to a wished brightness or detail, as ranks of a calibration set", ("attrictrl",),
          ScorerGives(metadata_keys=("intensity",))),
    Entry("scorer", "latent", "reward_servers.scorers.latent:Latent",
          "Reward Guided Latent Consistency Distillation (2403.11027)",
          "a CLIP that reads clean latents: nothing is decoded, with gradients", ("rg-lcd",),
          ScorerGives(gradients=True, accepts="latents")),
    Entry("scorer", "artifact", "reward_servers.scorers.artifact:Artifact",
          "Understanding Reward Hacking in Text-to-Image Reinforcement Learning",
          "freedom from artifacts: a VLM's probability of No", ("artifact-reward",), ScorerGives(columns=("clean",))),
    Entry("scorer", "d2_align", "reward_servers.scorers.d2_align:D2Align",
          "Taming Preference Mode Collapse via Directional Decoupling Alignment (2512.24146)",
          "HPSv2's score with the prompt moved along and against a learned direction, with gradients", ("d2-align",),
          ScorerGives(columns=("corrected", "plus", "minus"), gradients=True)),
    Entry("scorer", "adversarial_dino", "reward_servers.online.scorers:AdversarialDino",
          "The Image as Its Own Reward: Reinforcement Learning with Adversarial Reward for Image Generation",
          "a head on DINO features that learns beside the run to tell references from what is painted, with gradients",
          ("adv-grpo",), ScorerGives(columns=("reward",), gradients=True, whole_group=True)),
    Entry("scorer", "guarded_pickscore", "reward_servers.online.scorers:GuardedPickScore",
          "The Image as Its Own Reward: Reinforcement Learning with Adversarial Reward for Image Generation",
          "PickScore that learns beside the run whenever it prefers what is painted to references, with gradients",
          ("adv-grpo",), ScorerGives(gradients=True, whole_group=True)),
    Entry("scorer", "distilled", "reward_servers.online.scorers:Distilled",
          "Online Intrinsic Rewards for Decision Making Agents from Large Language Model Feedback",
          "a head on CLIP features that learns beside the run what a slow judge says", ("oni",),
          ScorerGives(columns=("reward", "raw"), whole_group=True)),
    Entry("scorer", "judge_pairs", "reward_servers.scorers.judge_pairs:JudgePairs",
          "Pref-GRPO: Pairwise Preference Reward-based GRPO (2508.20751)",
          "a judge's preferences between the images of a group, both orders asked", ("pref-grpo",),
          ScorerGives(kind="pair", columns=("wins",))),
    Entry("scorer", "judge_listwise", "reward_servers.scorers.judge_listwise:JudgeListwise",
          "RewardAnything: Generalizable Principle-Following Reward Models (2506.03637)",
          "a group marked at once by a principle in words, by a judge", ("rewardanything",),
          ScorerGives(whole_group=True, uncertainty=True)),
    Entry("prompts", "playground", "actors.prompts.playground:PlaygroundPrompts", "Salon",
          "captions of the playground world, with held-out splits", (),
          PromptsGive(metadata_keys=("playground",), has_held_out=True)),
    Entry("prompts", "text", "actors.prompts.files:TextPrompts", "Salon", "one prompt a line of a text file", (),
          PromptsGive(has_held_out=True)),
    Entry("prompts", "jsonl", "actors.prompts.files:JsonlPrompts", "Salon",
          "JSON lines with `prompt` (or `text`) and metadata", (), PromptsGive(has_held_out=True)),
    Entry("prompts", "parquet", "actors.prompts.files:ParquetPrompts", "Salon",
          "a parquet file with a prompt column; other columns are metadata", (), PromptsGive(has_held_out=True)),
    Entry("prompts", "pairs", "actors.prompts.pairs:PreferencePairs", "Salon",
          "preference pairs of image files from JSON lines: prompt, chosen, rejected", (),
          PromptsGive(source=Source.FILES)),
)  # fmt: skip


@dataclass(frozen=True)
class Resolved:
    """A plug-in by name or `module:Class`, with its declaration; `load()` imports it."""

    kind: Kind
    name: str
    target: str
    declares: Declaration

    def load(self) -> Any:
        """The class or function itself. Raises RegistryError naming what could not be imported."""
        return import_target(self.target)


def entries(kind: Kind | None = None) -> list[Entry]:
    """All rows, or those of one kind, in the order listed."""
    return [entry for entry in ENTRIES if kind is None or entry.kind == kind]


def names(kind: Kind) -> list[str]:
    return [entry.name for entry in entries(kind)]


def resolve(kind: Kind, name: str) -> Resolved:
    """The plug-in `name` of `kind`; `module:Class` is imported for its `declares`, built-in entries are not.

    Raises RegistryError with the names that exist.
    """
    if ":" in name:
        return Resolved(kind, name, name, getattr(import_target(name), "declares", None))
    for entry in entries(kind):
        if entry.name == name:
            return Resolved(kind, name, entry.target, entry.declares)
    raise RegistryError(f"no {kind} named {name!r}; there are {', '.join(names(kind))}, or your own as 'module:Class'")


def import_target(target: str) -> Any:
    """The object behind 'module:attribute', with the working directory importable."""
    module_name, _, attribute = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise RegistryError(
            f"{target}: cannot import {error.name!r} from the working directory or the environment"
        ) from error
    except AttributeError as error:
        raise RegistryError(f"{target}: module {module_name!r} has no {attribute!r}") from error
