"""One schema of a schema while it is rewritten: what it says, and where it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bdh_batch.text.schemas import NoGrammar

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
UNSATISFIABLE: Mapping[str, Any] = {"anyOf": []}
IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref")  # keywords whose schemas hold for the same value
LONGEST_POINTER = 256  # characters that are shown of one
SHOWN = "cannot be enforced while generating"

# Where a schema is: the way to the one that it is in, and what it is called there.
Path = tuple["Path", str] | None


def pointer(path: Path) -> str:
    """As a JSON pointer, `#/properties/a`; shortened where it is long."""
    parts: list[str] = []
    while path is not None:
        path, part = path
        parts.append(part.replace("~", "~0").replace("/", "~1")[:LONGEST_POINTER])
    text = "/".join(["#", *reversed(parts)])
    return text if len(text) <= LONGEST_POINTER else f"{text[:LONGEST_POINTER]}…"


class Rewriter(Protocol):
    """What rewrites all of it."""

    def child(self, schema: object, path: Path, alone: bool) -> Any:
        """What `schema` is rewritten to; it is filled in later."""

    def shared(self, schema: object, path: Path, alone: bool) -> Any:
        """As `child`, for one that is used several times."""

    def resolve(self, reference: str) -> object:
        """The schema that `reference` leads to. Raises NoGrammar where there is none."""

    def leave_out(self, path: Path, keyword: str, text: str) -> None:
        """Reports that `keyword` is left out. Raises NoGrammar where the schema is strict."""

    def intersect_step(self, digits: int) -> None:
        """Counts a step that may be intersected with others. Raises BadNumber where that cannot be kept exactly."""

    def compiles(self, schema: Mapping[str, Any]) -> bool: ...


@dataclass(frozen=True, slots=True)
class Node:
    """A schema that is an object.

    Args:
        schema: what it says; a keyword that is null says nothing.
        alone: whether nothing else has to hold for the same value.
    """

    rewriter: Rewriter
    schema: Mapping[str, Any]
    path: Path
    alone: bool

    def child(self, schema: object, alone: bool, *parts: str) -> Any:
        return self.rewriter.child(schema, self._path(parts), alone)

    def leave_out(self, keyword: str, text: str = SHOWN) -> None:
        self.rewriter.leave_out(self._path((keyword,)), keyword, text)

    def refusal(self, keyword: str, text: str) -> NoGrammar:
        return NoGrammar(f"{pointer(self._path((keyword,)))}: {keyword} {text}.")

    def _path(self, parts: tuple[str, ...]) -> Path:
        path = self.path
        for part in parts:
            path = (path, part)
        return path

    @property
    def types(self) -> list[str] | None:
        """None is any. Raises NoGrammar."""
        said = self.schema.get("type")
        types = [said] if isinstance(said, str) else said
        if types is not None and not (isinstance(types, list) and all(each in TYPES for each in types)):
            raise self.refusal("type", f"should be of {', '.join(TYPES)}")
        return types

    def allows(self, *types: str) -> bool:
        return self.types is None or any(each in types for each in self.types)

    def mapping(self, keyword: str) -> Mapping[str, Any]:
        """The object that `keyword` is, or an empty one."""
        found = self.schema.get(keyword, {})
        if not isinstance(found, Mapping):
            raise self.refusal(keyword, "should be an object")
        return found

    def items(self, keyword: str) -> list[Any]:
        """The list that `keyword` is, or an empty one."""
        found = self.schema.get(keyword, [])
        if not isinstance(found, list):
            raise self.refusal(keyword, "should be a list")
        return found

    def strings(self, keyword: str) -> list[str]:
        found = self.items(keyword)
        if not all(isinstance(each, str) for each in found):
            raise self.refusal(keyword, "should be a list of strings")
        return found

    @property
    def intersected(self) -> bool:
        """Whether it has schemas that hold for the same value."""
        return any(self.schema.get(keyword) for keyword in IN_PLACE)


def says_nothing(schema: object, *neutral: str) -> bool:
    """Whether every value satisfies `schema`, as far as it is seen at once; `neutral` types are no restriction."""
    if isinstance(schema, Mapping):
        return not schema.keys() & ASSERTIONS and schema.get("type") in (None, *neutral)
    return schema is True


OF_OBJECTS = {
    *("properties", "patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames"),
    *("required", "minProperties", "maxProperties", "dependentRequired", "dependentSchemas", "dependencies"),
}
OF_ARRAYS = {
    *("items", "prefixItems", "additionalItems", "unevaluatedItems", "minItems", "maxItems", "uniqueItems"),
    *("contains", "minContains", "maxContains"),
}
OF_STRINGS = {"minLength", "maxLength", "pattern", "format"}
OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
OF_ALL = {"const", "enum", "not", "if", "then", "else", "$dynamicRef", "$recursiveRef"}
OWN = OF_OBJECTS | OF_ARRAYS | OF_STRINGS | OF_NUMBERS | OF_ALL
ASSERTIONS = OWN.union(IN_PLACE)
