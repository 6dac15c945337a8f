"""Reading a configuration: YAML, overrides `a.b=c`, one clear message per mistake, and writing it back resolved."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from contracts.config.run import RunConfig
from contracts.errors import ConfigError, ConfigErrors


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run configuration of a YAML file with overrides applied. Raises ConfigErrors listing every mistake."""
    return config_from_tree(read_tree(Path(path), overrides))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain tree of a YAML file with overrides applied, not validated. Raises ConfigError."""
    tree = _read_yaml(path)
    for keys, value in parse_overrides(overrides):
        _set_in(tree, keys, value)
    return tree


def config_from_tree(tree: dict[str, Any]) -> RunConfig:
    """Validate a plain tree. Raises ConfigErrors listing every mistake."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigErrors([_explain(item) for item in error.errors()]) from error


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """['learner.ranks=2'] -> [(['learner', 'ranks'], 2)]; values are read as YAML."""
    parsed = []
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(text, "is not an override", "write section.key=value")
        try:
            parsed.append((key.strip().split("."), yaml.safe_load(value)))
        except yaml.YAMLError as error:
            raise ConfigError(key, f"value {value!r} is not readable as YAML", "quote it") from error
    return parsed


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read ({error.strerror})", "give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(str(path), "does not hold a mapping of sections", "see configs/ for examples")
    return tree


def _set_in(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    node: Any = tree
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _list_item(node, key, keys)
        else:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(".".join(keys), f"{'.'.join(keys[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_index(node, keys[-1], keys)] = value
    else:
        node[keys[-1]] = value


def _list_item(node: list[Any], key: str, keys: list[str]) -> Any:
    return node[_index(node, key, keys)]


def _index(node: list[Any], key: str, keys: list[str]) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(".".join(keys), f"{key!r} is no position in a list of {len(node)}", "count from 0")
    return int(key)


def _explain(item: Any) -> ConfigError:
    location = [str(part) for part in item["loc"]]
    field = ".".join(part for place, part in enumerate(location) if not _is_tag(item["loc"], place))
    if item["type"] == "extra_forbidden":
        return ConfigError(field, "unknown key", _did_you_mean(item["loc"]))
    if item["type"] == "missing":
        return ConfigError(field, "is required")
    if item["type"] == "union_tag_invalid":
        expected = item["ctx"]["expected_tags"].replace("'", "").replace(", custom", "")
        kind = location[-1]
        return ConfigError(
            f"{field}.name", f"unknown {kind} {item['ctx']['tag']!r}", f"one of {expected}, or module:Class"
        )
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict | BaseModel) else f" (given {item['input']!r})"
    return ConfigError(field or "configuration", message + given)


def _is_tag(location: Sequence[int | str], place: int) -> bool:
    """Whether the part at `place` is a variant's name that pydantic put there, and no key of the file."""
    in_list = place > 1 and location[place - 2] == "online" and isinstance(location[place - 1], int)
    return place > 0 and (location[place - 1] in ("objective", "aggregation") or in_list)


def _did_you_mean(location: Sequence[int | str]) -> str:
    models: list[Any] = [RunConfig]
    for part in location[:-1]:
        models = _descend(models, part)
    if not models:
        return "remove it"
    known = list(models[0].model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _descend(models: list[Any], part: int | str) -> list[Any]:
    """The models one level down `part`; a position in a list keeps them, an objective's tag picks one of them."""
    if isinstance(part, int):
        return models
    fields = [model.model_fields[part] for model in models if part in model.model_fields]
    inner = [model for field in fields for model in _models_in(field.annotation)]
    return inner or [model for model in models if _tag(model) == part]


def _tag(model: Any) -> str:
    name = model.model_fields.get("name")
    return name.default if name is not None and isinstance(name.default, str) else "custom"


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, typing.Annotated):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []
