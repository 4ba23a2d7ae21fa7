"""Reads YAML within the bounds of `documents.py`. Knows nothing about what it means.

By itself, as what reads models does without a library for YAML.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from bdh_batch.system.documents import DEEPEST, LARGEST_TEXT, LONGEST_NUMBER, Malformed, shown


def parse_yaml(text: str) -> Any:
    """What YAML's safe loader makes of it, but within bounds, without aliases, and with each key given once.

    Raises:
        Malformed
    """
    if len(text) > LARGEST_TEXT:
        raise Malformed(f"is larger than {LARGEST_TEXT:,} characters")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise Malformed(f"not YAML ({_reason(error)})") from error
    except Malformed:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # PyYAML's, of !!int x
        raise Malformed("not YAML (a value is not what its form or its tag says)") from error


def _reason(error: yaml.YAMLError) -> str:
    """What is wrong and where; not the line itself, which may hold a secret."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        return shown(f"{error.problem or error.context}{where}")
    return shown(" ".join(str(error).split()))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without what makes a small document large: aliases, depth, numbers without an end."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", event.start_mark)
        if self._depth >= DEEPEST:
            raise Malformed(f"nested more than {DEEPEST} deep")
        self._depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
            return node
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return values

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > LONGEST_NUMBER:
            raise Malformed(f"holds a number of {len(node.value):,} digits")
        return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
