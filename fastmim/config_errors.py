"""What is wrong with a configuration, in the words of whoever wrote it: key, got and wanted."""

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from fastmim.config_objective import OBJECTIVES


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of a nested mapping; an empty section is one."""
    keys = []
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        keys += leaves(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return keys


def explain(detail: Any, schema: type[BaseModel]) -> str:
    """A line that names key, got and wanted, of one of pydantic's errors."""
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
    if detail["type"] == "missing" and isinstance(location[-1], int):
        return f"{'.'.join(map(str, parts[:-1]))}={got!r}; expected {location[-1] + 1} values"
    if detail["type"] == "missing":
        return f"{key} is not set, and has no default; add {key}=VALUE"
    if detail["type"] == "too_long":
        return f"{key}={got!r}; expected {detail['ctx']['max_length']} values"
    wanted = _range_of(location, schema) or _wanted(detail)
    return f"{key}={got!r}; expected {wanted}"


def _wanted(detail: Any) -> str:
    """What pydantic asks for, in the words of YAML."""
    words = {
        "model": "a mapping of keys",
        "bool": "true or false",
        "tuple": "a list, as '[1, 2]'",
        "list": "a list, as '[1, 2]'",
        "dict": "a mapping, as '{key: value}'",
    }
    kind = detail["type"].partition("_")[0]
    return words.get(kind) or detail["msg"].removeprefix("Input should be ")


def truths_for_numbers(values: dict[str, Any], schema: type[BaseModel]) -> list[str]:
    """A line on each true or false in a number's place, which pydantic takes for 1 or 0: `flip: true` flips all."""
    lines = []
    for (*path, name), held in _truths(values).items():
        sections = tuple(path)
        if sections == ("objective",):
            sections = ("objective", values["objective"].get("name", "mae"))
        try:
            kinds = set(_kinds(_section(sections, schema).model_fields[name].annotation))
        except (KeyError, StopIteration, TypeError):  # no such key, which pydantic tells; or DeepSpeed's
            continue
        if kinds & {int, float} and bool not in kinds:
            wanted = _range_of((*sections, name), schema) or "a number"
            lines.append(f"{'.'.join([*path, name])}={held!r}; expected {wanted}")
    return lines


def _truths(values: dict[Any, Any], path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], bool]:
    """Each true and false of a nested mapping, by the keys that lead to it."""
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _truths(value, (*path, key))
        elif isinstance(value, bool):
            found[*path, key] = value
    return found


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a field takes, out of unions and annotations."""
    if get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            yield from _kinds(part)
    else:
        yield annotation


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
