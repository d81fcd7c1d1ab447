"""Typed reading of a configuration's nested objects; errors say which key, what it was and what it should be."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

LARGEST_SIZE = 1 << 24
"""A layer with two sides of it would have 2^48 weights: above any model, and its bytes are counted in 64 bits."""

_LARGEST_FLOAT32 = 3.4e38
_MISSING = object()
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


class ConfigError(ValueError):
    """A configuration is missing a key, or asks for something this implementation does not do."""


def shown(value: object) -> str:
    """A value for a message, which a long one must not fill."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return _BRIEF.repr(value)


class Section:
    """One level of the layout; errors carry the dotted path of the key."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{path or 'config'}: got {type(values).__name__}, expected an object")
        self._path, self._values = path, values

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def section(self, key: str) -> Section:
        return Section(self._name(key), self.get(key))

    def get(self, key: str, default: Any = _MISSING) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            raise ConfigError(f"{self._name(key)}: missing from the config")
        return default

    def integer(self, key: str, default: Any = _MISSING) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self._unexpected(key, value, "a positive integer")
        return value

    def number(self, key: str, default: Any = _MISSING, most: float = _LARGEST_FLOAT32) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value <= most:
            raise self._unexpected(key, value, f"a positive number up to {most:g}")
        return float(value)

    def eps(self) -> float:
        """Of a norm whose key it is."""
        return self.number("eps", 1e-6, most=1.0)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        if not isinstance(value, (list, tuple)) or not value or not all(type(i) is int for i in value):
            raise self._unexpected(key, value, "a list of integers")
        return tuple(value)

    def token_id(self, key: str, default: int) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 <= value < 2 * LARGEST_SIZE:
            raise self._unexpected(key, value, "a token's id")
        return value

    def token_ids(self, key: str, default: int | tuple[int, ...]) -> int | tuple[int, ...]:
        value = self.get(key, default)
        if not isinstance(value, (list, tuple)):
            return self.token_id(key, value)
        ids = self.integers(key)
        if not all(0 <= i < 2 * LARGEST_SIZE for i in ids):
            raise self._unexpected(key, value, "a token's id or a list of them")
        return ids

    def require(self, key: str, *expected: Any, default: Any) -> None:
        """The key, or its default where absent, must have one of the values that are implemented."""
        value = self.get(key, default)
        if value not in expected:
            raise self._unexpected(key, value, " or ".join(map(repr, expected)))

    def mlp_size(self, hidden_size: int) -> int:
        if self.get("size", None) is not None:
            return self.integer("size")
        return int(self.number("ratio", 4) * hidden_size)

    def _unexpected(self, key: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self._name(key)}: got {shown(value)}, expected {expected}")
