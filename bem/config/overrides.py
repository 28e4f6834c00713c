"""Changes from the command line: `training.steps=50`, `data.tasks.0.metric=f1`, `arms.v1.match=none`."""

from __future__ import annotations

import difflib
from typing import Any

import yaml

from bem.errors import ConfigError


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one value in a config that was read from YAML, in place.

    The key's parts are sections, and for lists places (from 0) or names of entries. A section that is
    not there is made; a task that is a name alone becomes an entry.

    Raises:
        ConfigError: not of the form key=value, no such entry of a list, or a part that is no section.
    """
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"Override {override!r} must look like section.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r}: the value is not valid YAML: {error}") from None
    here: Any = values
    at = 0  # parts that were followed
    while at < len(parts):
        try:
            name, used = _step(here, parts, at)
        except LookupError as error:
            raise ConfigError(f"Override {override!r}: {error.args[0]}") from None
        if at + used == len(parts):
            here[name] = value
        else:
            here[name] = _opened(here, name, is_task=parts[:at] == ["data", "tasks"])
        here, at = here[name], at + used


def _opened(here: Any, name: Any, is_task: bool) -> Any:
    """What lies there, as something that can be changed."""
    inner = here.get(name) if isinstance(here, dict) else here[name]
    if inner is None:
        return {}
    return {"name": inner} if is_task and isinstance(inner, str) else inner


def _step(here: Any, parts: list[str], at: int) -> tuple[str | int, int]:
    """(key or place in `here`, how many parts of the path name it)."""
    if isinstance(here, dict):
        return parts[at], 1
    path = ".".join(parts[:at])
    if not isinstance(here, list):
        raise LookupError(f"{path!r} is {here!r:.40}, not a section.")
    names = [entry.get("name") if isinstance(entry, dict) else entry for entry in here]
    for used in range(len(parts) - at, 0, -1):  # a name may have dots
        if (name := ".".join(parts[at : at + used])) in names:
            return names.index(name), used
    part = parts[at]
    if part.isdecimal() and int(part) < len(here):
        return int(part), 1
    near = difflib.get_close_matches(
        part, [n for n in names if isinstance(n, str)], n=1, cutoff=0.5
    )
    hint = f"Did you mean {near[0]!r}?" if near else f"Entries: {_listed(names)}."
    raise LookupError(f"{path!r} has no entry {part!r}. {hint}")


def _listed(names: list[Any]) -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(names)) or "none"
