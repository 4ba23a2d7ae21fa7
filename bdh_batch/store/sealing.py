"""Encryption at rest: AES-GCM, of records at once and of files in frames, so that no file is held whole.

A file has a key of its own, made of the store's key and a random salt at its beginning; the nonce of a frame is its
number, and whether it is the last one is authenticated, too. So frames can be neither exchanged nor left out.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator
from typing import BinaryIO

from bdh_batch.errors import ConfigError, StoreFailed

KEY_BYTES, NONCE_BYTES, TAG_BYTES, SALT_BYTES = 32, 12, 16, 32
FRAME = 2**20  # bytes of plain text
MAGIC = b"bdh-batch sealed file 1\n"
CHECK = b"bdh-batch store"


class SealingFailed(StoreFailed):
    """500: raised where something cannot be decrypted: it is damaged, or another key encrypted it."""


class Sealer:
    """Encrypts and decrypts with one key of 32 bytes. Its methods raise SealingFailed."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._key = key
        self._cipher = AESGCM(key)

    def seal(self, data: bytes, label: bytes) -> bytes:
        """`label` is what it is: it can be opened with the same one only."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, data, label)

    def open(self, sealed: bytes, label: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], label)
        except (InvalidTag, ValueError) as error:
            raise SealingFailed("A record is damaged, or was encrypted with another key.") from error

    def seal_file(self, plain: BinaryIO, sealed: BinaryIO, label: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        salt = os.urandom(SALT_BYTES)
        cipher = AESGCM(self._key_of(salt, label))
        sealed.write(MAGIC + salt)
        for number, (frame, mark) in enumerate(_frames(plain, FRAME)):
            sealed.write(cipher.encrypt(number.to_bytes(NONCE_BYTES), frame, mark))

    def open_file(self, sealed: BinaryIO, label: bytes) -> Iterator[bytes]:
        """Yields what was encrypted, frame by frame."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        head = sealed.read(len(MAGIC) + SALT_BYTES)
        if not head.startswith(MAGIC) or len(head) < len(MAGIC) + SALT_BYTES:
            raise SealingFailed("A state's file is damaged, or not encrypted.")
        cipher = AESGCM(self._key_of(head[len(MAGIC) :], label))
        for number, (frame, mark) in enumerate(_frames(sealed, FRAME + TAG_BYTES)):
            try:
                yield cipher.decrypt(number.to_bytes(NONCE_BYTES), frame, mark)
            except (InvalidTag, ValueError) as error:
                raise SealingFailed("A state's file is damaged or cut off.") from error

    def _key_of(self, salt: bytes, label: bytes) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        return HKDF(SHA256(), KEY_BYTES, salt, b"bdh-batch state " + label).derive(self._key)


def _frames(file: BinaryIO, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yields a file in pieces, each with whether it is the last one."""
    frame = file.read(size)
    while following := file.read(size):
        yield frame, b"more"
        frame = following
    yield frame, b"last"


def sealer_of(key: str) -> Sealer:
    """Returns what encrypts with a key as settings have it: 32 bytes in base64 or hexadecimal digits.

    Raises:
        ConfigError: that is no key, or the library is missing.
    """
    try:
        import cryptography  # noqa: F401 - an extra: needed only where there is a key
    except ImportError as error:
        text = "encryption needs a package: pip install 'bdh-batch[encryption]'"
        raise ConfigError(f"store.encryption_key: {text}") from error
    text = key.strip()
    try:
        raw = bytes.fromhex(text) if len(text) == 2 * KEY_BYTES else base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != KEY_BYTES:
        raise ConfigError("store.encryption_key: 32 bytes in base64 are expected, as `openssl rand -base64 32` prints")
    return Sealer(raw)
