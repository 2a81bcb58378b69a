"""Recipes: YAML files of this folder, resolved with `key=value` overrides into a `Config`."""

import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from fastmim.config import Config
from fastmim.config_errors import explain, leaves, truths_for_numbers
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
    sources = dict.fromkeys(leaves(values), recipe)
    for key, value in _apply(values, overrides or []):
        sources = {k: v for k, v in sources.items() if k != key and not k.startswith(f"{key}.")}
        sources |= dict.fromkeys(leaves({key: value}), "command line")
    held = set(leaves(values))
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
    if lines := truths_for_numbers(values, schema):
        raise ConfigError("; ".join(lines))
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(explain(detail, schema) for detail in error.errors())) from None


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
    """Reads 1e-3 and 5e8 as numbers and refuses a key that stands twice, as YAML 1.2 does and PyYAML does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            problem = f"{', '.join(twice)} twice in a section"
            raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


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
        hint = f"; what has spaces needs quotes, as '{key}=[1, 2]'" if text.startswith(("[", "{")) else ""
        raise ConfigError(f"{key}={text!r}: the value is not YAML{hint}") from None


def _set(values: dict[str, Any], path: list[str], value: Any, word: str) -> None:
    for i, part in enumerate(path[:-1]):
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"{word}: {'.'.join(path[: i + 1])} holds {values!r}, not a section")
    values[path[-1]] = value
