"""Flags of `bdh-batch plan` as dataclasses: from texts, within their ranges."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Self

from bdh_batch.errors import ConfigError


class Flags:
    """What dataclasses have in common whose fields are flags, but for the hyphens."""

    def refuse_unless(self, name: str, holds: bool, wanted: str) -> None:
        """Raises ConfigError, naming the flag and its value, where it does not hold what is `wanted`."""
        if not holds:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: should be {wanted}")

    @classmethod
    def names(cls) -> set[str]:
        return {field.name for field in fields(cls)}  # type: ignore[arg-type]  # of subclasses

    @classmethod
    def read(cls, given: dict[str, str]) -> Self:
        """From the texts of flags. Raises ConfigError, naming the flag, for what is no number, or an impossible one."""
        types = {field.name: str(field.type) for field in fields(cls)}  # type: ignore[arg-type]
        kinds: dict[str, Any] = {name: {"int": int, "float": float}.get(kind, str) for name, kind in types.items()}
        values = {}
        for name, text in given.items():
            try:
                values[name] = kinds[name](text)
            except ValueError:
                wanted = "a whole number" if kinds[name] is int else "a number"
                raise ConfigError(f"--{name.replace('_', '-')} {text}: should be {wanted}") from None
        return cls(**values)
