"""Dataclasses as tables, the way TOML and JSON have them, and back, with strict keys and types."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

from snowmelt.errors import UserError, nearest

Value = TypeVar("Value")


def to_tables(value: Any) -> Any:
    """A dataclass as TOML-ready tables; None, which TOML lacks, is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_tables(item) for name, item in pairs if item is not None}
    if isinstance(value, dict):
        return {name: to_tables(item) for name, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def from_table(kind: type[Value], table: dict[str, Any], where: str) -> Value:
    """A dataclass of `kind` from tables, read strictly: "8" is no number, 1 is no truth.

    Raises:
        UserError: an unknown key (naming the nearest one), a wrong type, a missing value; `where` names the file.
    """
    from cattrs import transform_error
    from cattrs.errors import ClassValidationError

    _refuse_unknown(kind, table, where)
    try:
        return _converter().structure(table, kind)
    except ClassValidationError as error:
        mistakes = [leaf for leaf in _leaves(error) if isinstance(leaf, UserError)]
        reasons = "; ".join(map(str, mistakes)).rstrip(".") or "; ".join(transform_error(error))
        raise UserError(f"{where} holds a value that does not fit: {reasons}.") from error


def _converter() -> Any:
    import cattrs

    converter = cattrs.Converter()

    def strict(accepted: tuple[type, ...], kind: type) -> None:
        def structure(value: Any, _kind: Any) -> Any:
            if type(value) not in accepted:
                raise TypeError(f"{value!r} is no {kind.__name__}")
            return kind(value)

        converter.register_structure_hook(kind, structure)

    for kind, accepted in ((bool, (bool,)), (int, (int,)), (float, (float, int)), (str, (str,))):
        strict(accepted, kind)
    converter.register_structure_hook_func(lambda kind: kind is Any, lambda value, _kind: value)
    return converter


def _leaves(error: BaseException) -> list[BaseException]:
    """The single mistakes in a group of groups."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def _refuse_unknown(kind: Any, table: dict[str, Any], where: str) -> None:
    """Unknown keys, and values that are not even of the right shape: tables for sections, lists for lists."""
    import typing

    hints = typing.get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            raise UserError(f"{where} has an unknown key {key!r}; {nearest(key, hints)}.")
        section = dataclasses.is_dataclass(hints[key])
        if section != isinstance(value, dict) and key != "request":
            raise UserError(f"{where}: {key!r} must be {'a table' if section else 'a value, not a table'}.")
        if typing.get_origin(hints[key]) is tuple and not isinstance(value, list | tuple):
            raise UserError(f"{where}: {key!r} must be a list.")
        if section and isinstance(value, dict):
            _refuse_unknown(hints[key], cast(dict[str, Any], value), where)
