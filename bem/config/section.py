"""A part of the config, and what is said when it is not as it must be."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from bem.errors import ConfigError


class Section(BaseModel):
    """A part of the config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


def parse(section: type[S], values: dict[str, Any], where: str) -> S:
    """Validate `values` as `section`; a problem becomes one readable ConfigError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(section, e, where) for e in error.errors())) from None


def _explain(section: type[Section], error: Any, where: str) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(whole)"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "extra_forbidden":
        return (
            f"{where}: {key}: {message} (got {error['input']!r:.80})"
            if error["loc"]
            else f"{where}: {message}"
        )
    known = _known_keys(section)
    nearest = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"{where}: unknown key {key!r}.{hint}"


def _known_keys(section: type[Section], seen: frozenset[type] = frozenset()) -> list[str]:
    """All keys of a section and of the sections below it."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        keys.append(name)
        for inner in _sections_in(field.annotation):
            if inner not in seen:
                keys += _known_keys(inner, seen | {inner})
    return keys


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for arg in getattr(annotation, "__args__", ()) for s in _sections_in(arg)]
