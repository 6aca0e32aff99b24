"""Encoded examples on disk, found again by a digest of all that they were made from.

A file is read only if it is the user's own, no other user may write to it, and its head and its bytes are
what they say: anything else is named and made anew. Files are written beside their place and renamed into it,
so processes that share a folder see a whole file or none; two that make the same one write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import transformers

from fedtune.data.encoded import Counts, EncodedList, EncodedSet
from fedtune.data.examples import Example
from fedtune.errors import system_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "fedtune encoded examples 2"  # another number with each change of what is encoded, and how
LEFT_S = 3600  # a part of a file that is older was left by a process that was killed
_ALIGNED = 64
_DTYPE = np.dtype("<i4")
log = logging.getLogger("fedtune")


class _Unusable(Exception):
    """Why a file is not taken."""


class EncodedCache:
    """Files of encoded examples in a folder; until `begin` it is only read from.

    Args:
        folder: Where they are; made when it is first needed, for the user alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: dict[str, EncodedSet] | None = {}
        self._refused = False

    def begin(self) -> bool:
        """From now on files are written, those first that were made until now; whether all of these are."""
        waiting, self._waiting = self._waiting, None
        with suppress(OSError):
            for part in self.folder.glob("*.part"):
                if time.time() - part.stat().st_mtime > LEFT_S:
                    part.unlink()
        return all([self._put(key, found) for key, found in (waiting or {}).items()])

    def fetch(self, key: str, make: Callable[[], EncodedSet]) -> tuple[EncodedSet, bool]:
        """What has that key, made if nothing has; and whether it is on disk, from where it comes back."""
        found = self.get(key)
        if found is not None:
            return found, not self._waiting or key not in self._waiting
        found = make()
        return found, self._put(key, found)

    def get(self, key: str) -> EncodedSet | None:
        """What was put under a key, mapped into memory and not read whole; None if there is nothing usable.

        A file that is damaged or another user's is named in the log.
        """
        if self._waiting and key in self._waiting:
            return self._waiting[key]
        path = self._path(key)
        try:
            return _read(path, key)
        except FileNotFoundError:
            return None
        except (_Unusable, ValueError, KeyError, TypeError) as error:
            why = str(error) or type(error).__name__
        except OSError as error:
            why = system_error(error)
        log.warning("%s is not usable and is made again: %s", path, why)
        return None

    def _put(self, key: str, found: EncodedSet) -> bool:
        """Whether a file has them now. A full disk is said once, and ends nothing."""
        if not len(found.items):
            return False
        if self._waiting is not None:
            self._waiting[key] = found
            return False
        try:
            self._write(key, found)
            return True
        except OSError as error:
            if not self._refused:
                why = system_error(error)
                log.warning("%s: encoded examples are not kept there (data.cache): %s", self.folder, why)
            self._refused = True
            return False

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.tokens"

    def _write(self, key: str, found: EncodedSet) -> None:
        items = found.items
        body = [np.ascontiguousarray(part, _DTYPE).data for part in (items.lengths, items.heads, items.ids)]
        head: dict[str, Any] = {
            "format": FORMAT,
            "key": key,
            "examples": len(items),
            "tokens": len(items.ids),
            "classes": items.classes,
            "counts": found.counts.document(),
            "sha256": _sha256(body),
        }
        line = json.dumps(head).encode()
        line += b" " * (-(len(line) + 1) % _ALIGNED) + b"\n"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = self.folder / f"{secrets.token_hex(8)}.part"
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(line)
                for piece in body:
                    file.write(piece)
            part.replace(self._path(key))
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _read(path: Path, key: str) -> EncodedSet:
    # O_NONBLOCK: to open a pipe that stands there would wait for somebody to write into it
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise _Unusable("it is no file")
        if about.st_uid != os.getuid():
            raise _Unusable("it is another user's")
        if stat.S_IMODE(about.st_mode) & 0o022:
            raise _Unusable("other users may write to it")
        line = file.readline(2**16)
        head = json.loads(line)
        if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("key") != key:
            raise _Unusable("it is of another version, or of other examples")
        examples, size = int(head["examples"]), int(head["tokens"])
        if about.st_size != len(line) + (2 * examples + size) * _DTYPE.itemsize:
            raise _Unusable("it is damaged: its length is not what it says")
        whole = np.memmap(file, _DTYPE, "r", offset=len(line))
    if _sha256([whole.data]) != head["sha256"]:
        raise _Unusable("it is damaged: its sha256 is not what it says")
    lengths, heads, ids = np.split(whole.view(np.ndarray), [examples, 2 * examples])
    return EncodedSet(
        EncodedList(lengths, heads, ids, classes=bool(head["classes"])), Counts(**head["counts"])
    )


def _sha256(pieces: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def key_of(
    tokenizer: str, settings: dict[str, Any], examples: Sequence[Example], texts: Iterable[Sequence[str]]
) -> str:
    """The digest of examples, of the texts that a template makes of them, of the tokenizer and the settings.

    The texts stand for the template, whatever its code is: `own` of each (`fedtune.data.control.Marked`) says
    which of its characters are control tokens.

    Args:
        tokenizer: As `tokenizer_sha256`.
        settings: Everything else that encoding depends on.
        examples: What is encoded.
        texts: Of each example what the tokenizer is given.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, tokenizer, settings, len(examples)], sort_keys=True).encode())
    for e, row in zip(examples, texts, strict=True):
        said: list[Any] = [e.instruction, e.input, e.output]
        said += [(str(text), getattr(text, "own", ())) for text in row]
        if e.turns:
            said.append(e.said())
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Identifies how a tokenizer encodes; None of one that is Python code in part, which has no such form."""
    if not tokenizer.is_fast:
        return None
    backend = tokenizer.backend_tokenizer
    try:
        document = json.loads(backend.to_str())
    except Exception:  # the library's word for parts that are Python code
        return None
    about = [
        {**document, "truncation": None, "padding": None},  # each call sets these two
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        sorted(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)),
        [tokenizer.bos_token_id, tokenizer.eos_token_id],
        [tokenizer.truncation_side, str(getattr(tokenizer, "split_special_tokens", ""))],
        [tokenizers.__version__, transformers.__version__],
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
