"""Knobs: plain dataclass fields, one level, set by flags over a file over their defaults; unknown ones are refused."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from pathlib import Path

import yaml

from trainer.errors import ConfigError

FORMAT_VERSION = 1  # of the model folder and the embeddings


def knob(default: object, help: str, free: bool = False) -> dataclasses.Field:
    """A field with a default that can be set by flag or file; ``help`` says what it does.

    A ``free`` one may change while a run goes on: it has no say in what is learned.
    """
    return dataclasses.field(default=default, metadata={"help": help, "free": free})


def knobs(*classes: type) -> dict[str, dataclasses.Field]:
    """All knobs of these dataclasses by name."""
    return {field.name: field for cls in classes for field in dataclasses.fields(cls) if "help" in field.metadata}


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

    Raises
    ------
    ConfigError
        Unreadable file, unknown knob (with the nearest known one), or a value of the wrong type.
    """
    known = knobs(*classes)
    values = _read(file, known) if file else {}
    for name, text in flags.items():
        if text is not None:
            values[name] = _cast(text, known[name], "--" + name.replace("_", "-"))
    return [{name: values[name] for name in knobs(cls) if name in values} for cls in classes]


def _read(file: Path, known: dict[str, dataclasses.Field]) -> dict[str, object]:
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(file, found=problem, expected="a YAML file", next_step="check --config") from error
    if not isinstance(content, dict):
        raise ConfigError(file, found=type(content).__name__, expected="`knob: value` lines", next_step="rewrite it")
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see `python -m trainer.pretrain --help`"
            raise ConfigError(file, found=f"unknown key '{name}'", expected=", ".join(known), next_step=hint)
    return {name: _cast(value, known[name], f"{file}, key '{name}'") for name, value in content.items()}


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
        raise ConfigError(where, found=repr(value), expected=expected, next_step=field.metadata["help"]) from None
    return cast
