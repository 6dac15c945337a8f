"""The driver of law 6's runs, a process of its own: python -m tests.laws.run_driver CONFIG (train|resume) [exact]."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cluster.controller import Parts
from cluster.driver import train
from cluster.resume import resumed_config
from contracts.config import load_config
from contracts.errors import SalonError

EXACT = Parts("tests.laws.exact_stand_ins:ExactPainter", "tests.laws.exact_stand_ins:ExactLearner")


def main(config_file: str, verb: str, *parts: str) -> int:
    config = load_config(config_file)
    try:
        if verb == "resume":
            config = resumed_config(str(Path(config.runs_dir) / config.name))
        return int(train(config, show=False, resume=verb == "resume", parts=EXACT if "exact" in parts else None))
    except SalonError as error:
        click.echo(f"error: {error}", err=True)
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
