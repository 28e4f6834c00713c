"""A part of the config, and what is said when it is not as it must be."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from bem.errors import ConfigError

MOST_HINTS = 3
LARGEST = 1e12
"""No setting means anything beyond it; in float32 and int64 everything below can be computed with."""

Seed = Annotated[int, Field(ge=0)]
"""Of random numbers."""
Folder = Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser()))]
"""A folder of the user's; a leading `~` is their home."""


class Section(BaseModel):
    """A part of the config: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    open_keys: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Field that is a plain mapping -> keys that it may have: what an error message can point to."""

    @field_validator("*")
    @classmethod
    def _numbers_are_of_this_world(cls, value: Any) -> Any:
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and not abs(number) <= LARGEST:
                raise ValueError(f"must be a finite number, at most {LARGEST:g}")
        return value


S = TypeVar("S", bound=Section)


def parse(section: type[S], values: Any, where: str) -> S:
    """Validate `values` as `section`; a problem becomes one readable ConfigError.

    Args:
        where: what an error message names: a file, an option, a function.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [_explanation(section, values, e, where) for e in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _explanation(section: type[Section], values: Any, error: Any, where: str) -> str:
    loc, message = error["loc"], error["msg"].removeprefix("Value error, ")
    if error["type"] != "extra_forbidden":
        place = readable_place(values, loc, missing=error["type"] == "missing")
        got = f" (got {error['input']!r:.80})" if place else ""
        return f"{where}: {place + ': ' if place else ''}{message}{got}"
    place, key = readable_place(values, loc[:-1]), str(loc[-1])
    if place and "[" not in place:
        place, key = "", f"{place}.{key}"
    return f"{where}: {place + ': ' if place else ''}unknown key {key!r}.{_hint(section, loc)}"


def readable_place(values: Any, loc: Sequence[Any], missing: bool = False) -> str:
    """`data.tasks[0] (mine): metric` for a path through the values; [0] has the name "mine".

    Args:
        loc: a path as pydantic gives it, with the names of a union's members in between.
        missing: the last part is a key that is not there.
    """
    text, here = "", values
    for number, part in enumerate(loc, 1):
        if isinstance(here, list | tuple) and isinstance(part, int):
            here = here[part] if part < len(here) else None
            name = here.get("name") if isinstance(here, Mapping) else here
            text += f"[{part}]" + (f" ({name})" if isinstance(name, str) else "")
        elif isinstance(here, Mapping) and (part in here or (missing and number == len(loc))):
            here = here.get(part)
            text += (": " if text.endswith(")") else "." if text else "") + str(part)
    return text


def _hint(section: type[Section], loc: Sequence[Any]) -> str:
    """Where the unknown key belongs, or which key it may have been meant to be."""
    key, own = str(loc[-1]), list(_section_at(section, loc[:-1]).model_fields)
    paths = list(_paths(section))
    elsewhere = [path for path in paths if path.rpartition(".")[2] == key]
    elsewhere.sort(key=lambda path: path.startswith("arms."))  # what holds for all arms first
    nearest = elsewhere or difflib.get_close_matches(key, own, n=1, cutoff=0.5)
    if not nearest:
        last = {path.rpartition(".")[2]: path for path in reversed(paths)}
        nearest = [last[m] for m in difflib.get_close_matches(key, last, n=1, cutoff=0.5)]
    names = " or ".join(repr(name) for name in nearest[:MOST_HINTS])
    return f" Did you mean {names}?" if names else ""


def _section_at(section: type[Section], loc: Sequence[Any]) -> type[Section]:
    """The section in which a path ends."""
    for part in loc:
        field = section.model_fields.get(str(part))
        if field is not None and (inner := _sections_in(field.annotation)):
            section = inner[0]
    return section


def _paths(section: type[Section], seen: frozenset[type] = frozenset()) -> Iterator[str]:
    """Every key of a section and of the sections below it, with dots; NAME stands for list entries."""
    for name, field in section.model_fields.items():
        yield name
        yield from (f"{name}.{key}" for key in section.open_keys.get(name, ()))
        several = "list[" in str(field.annotation)
        for inner in _sections_in(field.annotation):
            if inner not in seen:
                above = f"{name}.NAME" if several else name
                yield from (f"{above}.{path}" for path in _paths(inner, seen | {inner}))


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for arg in getattr(annotation, "__args__", ()) for s in _sections_in(arg)]
