"""Counts what stands in the bytes of a protobuf message before it is parsed.

The parser holds the interpreter's lock for as long as it takes, and four megabytes of empty messages take a quarter of
a second. So what would take long is refused before, by walking over tags and lengths, as JSON is.
"""

from __future__ import annotations

from google.protobuf.descriptor import Descriptor, FieldDescriptor

VARINT, FIXED64, LENGTH, START_GROUP, END_GROUP, FIXED32 = range(6)
WIDTHS = {FIXED64: 8, FIXED32: 4}
CONTINUES = bytes(range(128, 256))  # bytes of a varint that are not its last
FIXED = {  # bytes of an element in a packed field; of others, elements are varints
    FieldDescriptor.TYPE_FLOAT: 4,
    FieldDescriptor.TYPE_FIXED32: 4,
    FieldDescriptor.TYPE_SFIXED32: 4,
    FieldDescriptor.TYPE_DOUBLE: 8,
    FieldDescriptor.TYPE_FIXED64: 8,
    FieldDescriptor.TYPE_SFIXED64: 8,
}
UNPACKED = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


class _Malformed(Exception):
    """The bytes are no message from here on: the parser will say so as soon as it comes to them."""


class TooMany(Exception):
    """Raised where a message has more `things`, fields or numbers, than it may."""

    def __init__(self, things: str, most: int) -> None:
        super().__init__(f"The message has more than {most} {things}")
        self.things = things


class Counter:
    """Counts the fields and the packed numbers of one message, those of inner messages included.

    Raises, when it is run:
        TooMany
    """

    def __init__(self, most_fields: int, most_numbers: int) -> None:
        self._most_fields = most_fields
        self._most_numbers = most_numbers
        self._fields = self._numbers = 0

    def run(self, raw: bytes, kind: Descriptor) -> None:
        try:
            self._message(raw, 0, len(raw), kind)
        except _Malformed:
            return

    def _message(self, raw: bytes, at: int, end: int, kind: Descriptor) -> None:
        known = kind.fields_by_number
        while at < end:
            self._fields += 1
            if self._fields > self._most_fields:
                raise TooMany("fields", self._most_fields)
            tag, at = _varint(raw, at, end)
            wire_type = tag & 7
            if wire_type == VARINT:
                _, at = _varint(raw, at, end)
            elif wire_type in WIDTHS:
                at += WIDTHS[wire_type]
            elif wire_type == LENGTH:
                size, at = _varint(raw, at, end)
                if size > end - at:
                    raise _Malformed
                self._inner(raw, at, at + size, known.get(tag >> 3))
                at += size
            elif wire_type not in (START_GROUP, END_GROUP):
                raise _Malformed

    def _inner(self, raw: bytes, at: int, end: int, field: FieldDescriptor | None) -> None:
        if field is None or field.type in UNPACKED:
            return
        if field.message_type is not None:
            self._message(raw, at, end, field.message_type)
            return
        width = FIXED.get(field.type)
        self._numbers += (end - at) // width if width else len(raw[at:end].translate(None, CONTINUES))
        if self._numbers > self._most_numbers:
            raise TooMany("numbers", self._most_numbers)


def _varint(raw: bytes, at: int, end: int) -> tuple[int, int]:
    """The number that begins there, and where the next thing does."""
    value = shift = 0
    while at < end and shift < 70:
        byte = raw[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise _Malformed
