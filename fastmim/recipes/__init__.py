"""Recipes: YAML files of this folder, resolved with `key=value` overrides into a `Config`."""

import difflib
import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fastmim.config import Config
from fastmim.config_objective import OBJECTIVES
from fastmim.errors import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)

_RUNS = resources.files(__name__)
_EVALUATIONS = _RUNS / "evaluate"


def names() -> list[str]:
    """The recipes that are installed."""
    return sorted(entry.name[:-5] for entry in _RUNS.iterdir() if entry.name.endswith(".yaml"))


def evaluations() -> list[str]:
    """The recipes of `fastmim evaluate` that are installed."""
    return sorted(entry.name[:-5] for entry in _EVALUATIONS.iterdir() if entry.name.endswith(".yaml"))


def load(recipe: str, overrides: list[str] | None = None) -> Config:
    """Resolve a recipe.

    Args:
        recipe: the name of an installed recipe, or the path of a YAML file.
        overrides: `key.sub=value` words; a value is read as YAML.

    Raises:
        ConfigError: one message that names every bad key, its value and what is accepted.
    """
    return load_with_sources(recipe, overrides)[0]


def load_with_sources(recipe: str, overrides: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """Like `load`, with a map from each key that was set to where it was set."""
    values = _read(recipe, "--config", _RUNS, names())
    sources = dict.fromkeys(_leaves(values), recipe)
    for key, value in _apply(values, overrides or []):
        sources = {k: v for k, v in sources.items() if k != key and not k.startswith(f"{key}.")}
        sources |= dict.fromkeys(_leaves({key: value}), "command line")
    held = set(_leaves(values))
    return build(values), {key: source for key, source in sources.items() if key in held}


def load_evaluation(schema: type[Schema], protocol: str, recipe: str | None, overrides: list[str]) -> Schema:
    """Resolve the settings of an evaluation.

    Args:
        schema: of the protocol.
        protocol: its name, which a recipe tells too.
        recipe: one of `evaluations`, or the path of a YAML file; None takes the schema's defaults.
        overrides: as of `load`.

    Raises:
        ConfigError: as `load`, or a recipe of another protocol.
    """
    values = {} if recipe is None else _read(recipe, "--recipe", _EVALUATIONS, evaluations())
    own = values.pop("protocol", protocol if recipe is None else None)
    if own != protocol:
        raise ConfigError(f"--recipe {recipe}: protocol={own!r}; expected {protocol!r}, which is evaluated")
    _apply(values, overrides)
    return build_as(schema, values)


def override(overrides: list[str]) -> Config:
    """The defaults, changed by `key.sub=value` words; for commands that read a part of a configuration."""
    return build(parse_overrides(overrides))


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """`key.sub=value` words as a nested mapping, not yet validated."""
    values: dict[str, Any] = {}
    _apply(values, overrides)
    return values


def _apply(values: dict[str, Any], overrides: list[str]) -> list[tuple[str, Any]]:
    """Set every override in `values`; returns them as (key, value)."""
    parsed = [(word, *_parse_override(word)) for word in overrides]
    own = values.get("objective")
    named = [value for _, key, value in parsed if key == "objective.name"]
    if named and isinstance(own, dict) and own.get("name", "mae") != named[-1]:
        values["objective"] = {}  # the recipe's options belong to its own objective
    for word, key, value in parsed:
        _set(values, key.split("."), value, word)
    return [(key, value) for _, key, value in parsed]


def build(values: dict[str, Any]) -> Config:
    """Validate a nested mapping; every error of pydantic becomes a line that names key, got and wanted."""
    return build_as(Config, values)


def build_as(schema: type[Schema], values: dict[str, Any]) -> Schema:
    """Like `build`, for another root than a run's configuration."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail, schema) for detail in error.errors())) from None


def dump(config: Config, sources: dict[str, str] | None = None) -> str:
    """The configuration as YAML; with `sources`, each value's origin as a comment."""
    text = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=1000)
    if sources is None:
        return text
    lines, path = [], []
    for line in text.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        path = [*path[:indent], line.strip().split(":", 1)[0]]
        opens_section = line.endswith(":")
        lines.append(line if opens_section else f"{line:<48} # {sources.get('.'.join(path), 'default')}")
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Sections in block style, lists on one line."""


_Dumper.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 and 5e8 as numbers, as YAML 1.2 does; PyYAML asks for a point and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _read(recipe: str, option: str, folder: Traversable, installed: list[str]) -> dict[str, Any]:
    """The mapping in a recipe: one of those `installed` in a folder, or a file of the person's."""
    told = f"{option} {recipe}"
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"{told}: no such file; expected a YAML file or one of {', '.join(installed)}")
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{told}: cannot be read as text ({error})") from None
    elif recipe in installed:
        text = (folder / f"{recipe}.yaml").read_text()
    else:
        raise ConfigError(f"{told}: unknown recipe; expected one of {', '.join(installed)} or a .yaml file")
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{told}: not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{told}: holds a {type(values).__name__}; expected a mapping of sections")
    return values


def _parse_override(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word!r} is not an override; expected key.sub=value")
    try:
        return key, yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{key}={text!r}: the value is not YAML") from None


def _set(values: dict[str, Any], path: list[str], value: Any, word: str) -> None:
    for i, part in enumerate(path[:-1]):
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"{word}: {'.'.join(path[: i + 1])} holds {values!r}, not a section")
    values[path[-1]] = value


def _leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        keys += _leaves(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return keys


def _explain(detail: Any, schema: type[BaseModel]) -> str:
    location, got = detail["loc"], detail["input"]
    if detail["type"] == "union_tag_invalid":
        return f"objective.name={got.get('name')!r}; expected one of {', '.join(OBJECTIVES)}"
    # Below `objective` pydantic puts the name of the objective that was chosen.
    parts = location[:1] + location[2:] if location[:1] == ("objective",) else location
    key = ".".join(map(str, parts))
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == "extra_forbidden":
        accepted = _section(location[:-1], schema).model_fields
        close = difflib.get_close_matches(str(location[-1]), accepted, n=1)
        hint = f"did you mean {'.'.join([*map(str, parts[:-1]), close[0]])}? " if close else ""
        return f"{key}={got!r}: unknown key; {hint}expected one of {', '.join(accepted)}"
    if detail["type"] == "missing":
        return f"{key} is not set; {detail['msg'].lower()}"
    if detail["type"].startswith("model_"):
        return f"{key}={got!r}; expected a mapping of keys"
    wanted = _range_of(location, schema) or detail["msg"].removeprefix("Input should be ")
    return f"{key}={got!r}; expected {wanted}"


_BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": ">=",
    "exclusiveMaximum": "<",
    "maximum": "<=",
    "multipleOf": "a multiple of",
}


def _range_of(location: tuple[Any, ...], schema: type[BaseModel]) -> str:
    """Kind and every bound of a number, not only the one that was broken; empty for what is no bounded number."""
    if not all(isinstance(part, str) for part in location):
        return ""
    known = _section(location[:-1], schema).model_json_schema()["properties"][location[-1]]
    variants = [known, *known.get("anyOf", [])]
    kinds = [v["type"] for v in variants if v.get("type") in ("integer", "number")]
    bounds = [f"{sign} {v[name]:g}" for v in variants for name, sign in _BOUNDS.items() if name in v]
    if not kinds or not bounds:
        return ""
    return f"{'an integer' if kinds[0] == 'integer' else 'a number'} {' and '.join(bounds)}"


def _section(location: tuple[Any, ...], schema: type[BaseModel]) -> type[BaseModel]:
    if location[:1] == ("objective",):
        return OBJECTIVES[location[1]]
    section = schema
    for part in location:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return section
