"""The reader of small documents: whatever is in one, the response is what it says or one line."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st

from bdh_batch.system.documents import DEEPEST, LARGEST_TEXT, MOST_LISTED, Malformed, listed, parse_json, read_text
from bdh_batch.system.yaml_documents import parse_yaml

PACKAGE = Path(__file__).parent.parent / "bdh_batch"

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def reason(parse: object, text: str) -> str:
    assert callable(parse)
    with pytest.raises(Malformed) as error:
        parse(text)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 300
    return message


@given(plain)
def test_what_is_within_bounds_is_read_as_it_is(values: object) -> None:
    assert parse_json(json.dumps(values)) == values
    assert parse_yaml(yaml.safe_dump(values)) == values


@given(st.text() | st.text("{}[]\"\\:,0123456789e.-nulltruefalse \n&*!<>|?#'"))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_json, parse_yaml):
        with contextlib.suppress(Malformed):
            parse(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"nested more than {DEEPEST} deep"),
        ("9" * 1_000_000, "a number of 1,000,000 digits"),
        ("-1." + "9" * 1_000_000, "digits"),
        ("1e999", "too large"),
        ("-Infinity", "-Infinity is not a number"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        ("{", "not JSON (Expecting property name"),
        ("", "not JSON"),
    ],
)
def test_json_beyond_the_bounds_is_refused(text: str, part: str) -> None:
    assert part in reason(parse_json, text)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {k0: 0}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], k{n}: 0}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (LAUGHS, "aliases (*name) are not allowed at line 2, column 10"),
        (MERGES, "aliases (*name) are not allowed"),
        ("&a [*a]", "aliases"),
        ("[" * 100_000, f"nested more than {DEEPEST} deep"),
        ("\n".join(" " * depth + "a:" for depth in range(1000)), f"nested more than {DEEPEST} deep"),
        ("- " * 100_000, f"nested more than {DEEPEST} deep"),
        ("9" * 900_000, "a number of 900,000 digits"),
        ("0x" + "f" * 900_000, "digits"),
        ("1:" * 400_000 + "1", "digits"),
        ("!!int ''", "a value is not what its form or its tag says"),
        ("!!bool x", "a value is not"),
        ("!!timestamp x", "a value is not"),
        ("2001-99-99", "a value is not"),
        ("{a: 1, a: 2}", "a key is given twice"),
        ("? [a]\n: 1", "unhashable"),
        ("a: b: c", "at line 1, column 5"),
        ("a: \x00", "not YAML"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a" * (LARGEST_TEXT + 1), "is larger than"),
    ],
)
def test_yaml_beyond_the_bounds_is_refused(text: str, part: str) -> None:
    assert part in reason(parse_yaml, text)


def test_an_error_of_yaml_does_not_repeat_the_line(tmp_path: Path) -> None:
    assert "sesame" not in reason(parse_yaml, "auth: {api_keys: [sesame, 'sesame]}")


def test_text_is_utf8_whatever_the_locale_and_may_come_through_a_pipe(tmp_path: Path) -> None:
    file = tmp_path / "pipe"
    os.mkfifo(file)
    writer = threading.Thread(target=file.write_bytes, args=("\ufeffgrün".encode(),))
    writer.start()
    assert read_text(file) == "grün"
    writer.join()
    with pytest.raises(Malformed, match="is larger than 10 bytes"):
        read_text(Path("/dev/zero"), 10)


def test_a_list_of_problems_has_an_end() -> None:
    assert listed(["a", "b"]) == "a; b"
    assert listed(map(str, range(100_000)), ", ").endswith(f"{MOST_LISTED - 1}, and 99,950 more")


def reads_and_writes(source: Path) -> Iterator[ast.Call]:
    """Calls that open text."""
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            modes = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if name in ("read_text", "write_text") or (name in ("open", "fdopen") and modes and "b" not in modes[-1]):
                yield node


def names_encoding(call: ast.Call) -> bool:
    constants = [each.value for each in call.args if isinstance(each, ast.Constant)]
    own = isinstance(call.func, ast.Name)  # read_text of documents.py
    return own or any(each.arg == "encoding" for each in call.keywords) or bool({"utf-8", "utf-8-sig"} & {*constants})


def test_no_text_is_read_or_written_in_the_locales_encoding() -> None:
    calls = [(source, call) for source in PACKAGE.rglob("*.py") for call in reads_and_writes(source)]
    assert len(calls) > 10
    assert [f"{source}:{call.lineno} names no encoding" for source, call in calls if not names_encoding(call)] == []
