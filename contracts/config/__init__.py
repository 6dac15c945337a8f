"""The configuration of a run: one YAML file, one pydantic tree, overrides as a.b=c.

base.py strict model and error texts; model.py, rollout.py, scoring.py, objectives.py, guards.py, learner.py the
sections; run.py the whole; load.py reading, overriding and saving. Imports no torch.
"""

from contracts.config.load import load_config, parse_overrides, to_yaml
from contracts.config.run import RunConfig

__all__ = ["RunConfig", "load_config", "parse_overrides", "to_yaml"]
