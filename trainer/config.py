"""Knobs: plain dataclass fields, one level, set by flags over a file over their defaults; unknown ones are refused."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from pathlib import Path

import yaml

from trainer.errors import ConfigError

FORMAT_VERSION = 1  # of the model folder and the embeddings


def knob(
    default: object, help: str, least: float = 0, below: float = math.inf, free: bool = False
) -> dataclasses.Field:
    """A field that can be set by flag or file; ``help`` says what it does.

    Of choices, ``a|b|c``, the first is the default; numbers lie in [least, below). A ``free`` one may change while a run goes
    on: it has no say in what is learned.
    """
    default, *others = default.split("|") if isinstance(default, str) else [default]
    choices = (default, *others) if others else ()
    help += f" [{', '.join(choices)}]" if others else ""
    metadata = {"help": help, "choices": choices, "least": least, "below": below, "free": free}
    return dataclasses.field(default=default, metadata=metadata)


def knobs(*classes: type) -> dict[str, dataclasses.Field]:
    """All knobs of these dataclasses by name."""
    return {field.name: field for cls in classes for field in dataclasses.fields(cls) if "help" in field.metadata}


def check(settings: object) -> None:
    """Raise ConfigError where a knob is of another type, none of its choices, or out of its range."""
    for name, field in knobs(type(settings)).items():
        value, known, kind = getattr(settings, name), field.metadata, type(field.default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise refusal(settings, {int: "a whole number", float: "a number", str: "text"}[kind], name)
        if known["choices"] and value not in known["choices"]:
            raise refusal(settings, " or ".join(known["choices"]), name)
        if not isinstance(value, str) and not known["least"] <= value < known["below"]:
            bound = "finite" if known["below"] == math.inf else f"below {known['below']}"
            raise refusal(settings, f"at least {known['least']}, and {bound}", name)


def refusal(settings: object, expected: str, *names: str) -> ConfigError:
    """The error that names the values of these knobs and how to change them."""
    found = ", ".join(f"{name} {getattr(settings, name)}" for name in names)
    flags = " or ".join(f"--{name.replace('_', '-')}" for name in names)
    next_step = f"change {flags}, or `{'` or `'.join(names)}` in the config file"
    return ConfigError("settings", found, expected, next_step)


def fixed(settings: object) -> dict[str, object]:
    """The fields of a dataclass that may not change while a run goes on."""
    fields = dataclasses.fields(settings)
    return {field.name: getattr(settings, field.name) for field in fields if not field.metadata.get("free")}


def add_flags(parser: argparse.ArgumentParser, *classes: type) -> None:
    """One ``--flag`` a knob; a flag that isn't given leaves the file's value, or the default."""
    for name, field in knobs(*classes).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, metavar="X", help=f"{field.metadata['help']} (default {field.default})")


def settings(file: Path | None, flags: dict[str, str | None], *classes: type) -> list[dict[str, object]]:
    """The values set by file and flags (flags win), as keyword arguments for each dataclass.

    ConfigError names an unreadable file, an unknown knob (and the nearest known one), or a value of the wrong type.
    """
    known = knobs(*classes)
    given = [(name, value, f"{file}, key '{name}'") for name, value in (_read(file, known) if file else {}).items()]
    given += [(name, text, f"--{name.replace('_', '-')}") for name, text in flags.items() if text is not None]
    values = {name: _cast(value, known[name], where) for name, value, where in given}
    return [{name: values[name] for name in knobs(cls) if name in values} for cls in classes]


def _read(file: Path, known: dict[str, dataclasses.Field]) -> dict[str, object]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(file, " ".join(str(error).split()), "a YAML file", "check --config") from error
    if not isinstance(content, dict):
        raise ConfigError(file, type(content).__name__, "`knob: value` lines", "rewrite it")
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see `python -m trainer.pretrain --help`"
            raise ConfigError(file, f"unknown key '{name}'", ", ".join(known), hint)
    return content


def _cast(value: object, field: dataclasses.Field, where: str) -> object:
    """The value in the type of the knob's default; a fraction never becomes a whole number, nor a bool a number."""
    kind = type(field.default)
    try:
        if isinstance(value, bool) or kind is str and not isinstance(value, str):
            raise ValueError
        cast = kind(value)  # YAML reads 1e-4 as text, flags are text: both become numbers here
        if kind is int and not isinstance(value, str) and cast != value:
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        expected = {int: "a whole number", float: "a number", str: "text"}[kind]
        raise ConfigError(where, repr(value), expected, field.metadata["help"]) from None
    return cast
