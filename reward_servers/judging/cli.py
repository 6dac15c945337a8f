"""`python -m reward_servers judge up|probe`. Imports stay within the commands, so that --help answers at once.

Does not own: what the commands do (up, probe).
"""

from __future__ import annotations

import sys
from typing import Any

import click

from reward_servers.reporting import tell_in_one_line


@click.group(help="Judges: vision-language models that score images.")
def judge() -> None:
    """Sub-commands below."""


@judge.command()
@click.argument("model")
@click.option("--scorer", default="vqascore", show_default=True, help="Scorer put in front; one that asks a judge.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Option of the scorer (YAML).")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--python", "python", default=None, metavar="PATH",
              help="Interpreter with vLLM.  [default: SALON_VLLM_PYTHON, .cache/vllm_cpu on a CPU]")  # fmt: skip
@click.option(
    "--vllm-arg", "arguments", multiple=True, metavar="ARG", help="Passed on: --vllm-arg=--max-model-len=4096."
)
@click.option("--vllm-port", default=0, type=click.IntRange(0, 65535), help="vLLM's port on loopback; 0: any free one.")
@click.option("--vllm-log", default=None, type=click.Path(dir_okay=False), help="File for vLLM's output.")
@click.option("--startup-s", default=900.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Longest until vLLM answers its canary.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="The scorer's address.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="The scorer's port.")
@click.option("--max-batch", default=64, show_default=True, type=click.IntRange(1), help="Images judged at once.")
@click.option("--ready-file", default=None, type=click.Path(dir_okay=False), help="Written when ready: url and pid.")
@click.option("--parent-pid", default=None, type=int, help="End when this parent process has gone.")
def up(model: str, scorer: str, options: tuple[str, ...], **given: Any) -> None:
    """Serve MODEL (a folder or hub name) with vLLM and put it behind a scorer, until SIGTERM.

    vLLM is started in an environment of its own, watched, and restarted when it dies or hangs.
    """

    def work() -> None:
        import logging

        from reward_servers.judging.up import up as bring_up
        from reward_servers.judging.vllm import VllmSettings, find_device, find_python
        from reward_servers.settings import ServerSettings

        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        device = find_device() if given["device"] == "auto" else given["device"]
        vllm = VllmSettings(
            model, find_python(device, given["python"]), device, port=given["vllm_port"], arguments=given["arguments"],
            startup_s=given["startup_s"], log_path=given["vllm_log"],
        )  # fmt: skip
        settings = ServerSettings(host=given["host"], port=given["port"], max_batch=given["max_batch"])
        bring_up(vllm, scorer, options, settings, given["ready_file"], given["parent_pid"])

    tell_in_one_line(work)


@judge.command()
@click.argument("url")
@click.option("--model", required=True, help="The model's name on that server.")
@click.option("--question", default=None, help="Yes/no question with {prompt} in it.  [default: VQAScore's]")
@click.option("--pairs/--no-pairs", default=True, show_default=True, help="Probe comparisons of two images as well.")
@click.option("--cases", "num_cases", default=32, show_default=True, type=click.IntRange(2), help="Pictures a probe.")
@click.option("--side", default=None, type=click.IntRange(32), help="Enlarge the playground's 32x32 pictures.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--min-mass", default=0.1, show_default=True, type=click.FloatRange(0, 1), help="As in the scorers.")
@click.option("--threshold", default=None, type=click.FloatRange(0, 1), help="Exit 1 when a key fools it more often.")
@click.option("--json", "as_json", is_flag=True, help="The rates as JSON.")
def probe(url: str, model: str, as_json: bool, threshold: float | None, **given: Any) -> None:
    """Ask a judge at URL what it should not fall for, and print how often it does.

    URL is any OpenAI-compatible server, without the /v1; its API key is read from SALON_JUDGE_TOKEN.
    """

    def work() -> None:
        import asyncio
        import json

        from reward_servers.judging import probe as probing

        report = asyncio.run(_probe(url, model, given))
        if as_json:
            click.echo(json.dumps(report.as_json(), indent=2))
        else:
            probing.show(report)
        worst = report.worst_false_positive()
        if threshold is not None and worst is not None and (worst.rate or 0.0) > threshold:
            click.echo(f"{worst.probe} got a yes in {worst.rate:.1%} of cases", err=True)
            sys.exit(1)

    tell_in_one_line(work)


async def _probe(url: str, model: str, given: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from contracts.config.judges import JudgeOptions
    from contracts.errors import ConfigError, ScoringError
    from reward_servers.client.endpoint import AttemptFailed
    from reward_servers.judging import probe as probing
    from reward_servers.judging.judge import Judge
    from reward_servers.judging.protocols.pairwise import Pairwise
    from reward_servers.judging.protocols.yes_no import YesNo

    try:
        options = JudgeOptions(urls=(url,), model=model, min_mass=given["min_mass"])
    except ValidationError as error:
        raise ConfigError("URL", error.errors()[0]["msg"]) from error
    cases = probing.playground_cases(given["num_cases"], given["seed"])
    if given["side"]:
        cases = probing.enlarged(cases, given["side"])
    async with Judge(options) as asked:
        try:
            await asked.check(options.timeout_s)
        except AttemptFailed as error:
            raise ScoringError(error.reason) from error
        question = YesNo(given["question"]) if given["question"] else YesNo()
        return await probing.probe(asked, cases, question, Pairwise() if given["pairs"] else None)
