"""Texts of users to token ids: what they write stays text, also where it reads like a control token.

`</s>` in an answer must not teach a model to stop there, nor `<|im_end|>` in a prompt end the user's turn. A
text is encoded as ever; only where a special token came up is it encoded again, with that token spelled out.
What a template writes around the user's fields keeps its control tokens: `Marked` says where they stand.

Special are the tokens that the tokenizer itself declares so. Its other added words (runs of blanks) are
text, and so is a special token of a single character ("!" to pad with), which has no other spelling. The
tags around thoughts (`<think>`) are text too, whatever the tokenizer declares: they end nothing, templates
look for them in what the assistant says, and who tunes a model to think has them in the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from fedtune.data.marked import Marked
from fedtune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EDGE = "\U0010fffe"  # a noncharacter: no text may hold it, and no vocabulary does
THINKING = ("<think>", "</think>", "[THINK]", "[/THINK]")
_FILLERS = "xzjqvwkyuhgbfcmdlprnstioae"


@dataclass(frozen=True)
class Special:
    """A tokenizer's special tokens."""

    ids: dict[str, int]
    unknown: int | None  # the id that only says "not in the vocabulary"; None where it means more than that
    tags: Mapping[int, str]  # those around thoughts, which are text

    @cached_property
    def pattern(self) -> re.Pattern[str] | None:
        """Finds them in a text, the longest first, as tokenizers do; None where there are none."""
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if self.ids else None

    @cached_property
    def controls(self) -> frozenset[int]:
        """Those that must not come from data."""
        return frozenset(self.ids.values()) - {self.unknown}


# Some tokenizers have thousands, and every example asks for them.
_SPECIAL: WeakKeyDictionary[Any, tuple[tuple[Any, ...], Special]] = WeakKeyDictionary()
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Special:
    """A tokenizer's special tokens, as they are now."""
    if not hasattr(tokenizer, "added_tokens_decoder"):
        return Special({}, None, {})  # what only looks like a tokenizer of transformers has no such tokens
    # what changes when a tokenizer is given more of them: its length and roles, which are read quickly
    state = len(tokenizer), *(getattr(tokenizer, role, None) for role in _ROLES)
    known = _SPECIAL.get(tokenizer)
    if known is None or known[0] != state:
        known = _SPECIAL[tokenizer] = state, _read_special(tokenizer)
    return known[1]


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Token ids as text, without special tokens; tags around thoughts stay."""
    tags, texts, start = special_tokens(tokenizer).tags, list[str](), 0
    for place, token in enumerate([*ids, -1]):
        if token in tags or place == len(ids):
            texts += [str(tokenizer.decode(ids[start:place], skip_special_tokens=True)), tags.get(token, "")]
            start = place + 1
    return "".join(texts)


def _read_special(tokenizer: PreTrainedTokenizerBase) -> Special:
    ids = {token.content: place for place, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    unknown = getattr(tokenizer, "unk_token_id", None)
    more = {
        getattr(tokenizer, f"{role}_id", None) for role in _ROLES if role not in ("unk_token", "pad_token")
    }
    if unknown in more:
        unknown = None
    told = {text: place for text, place in ids.items() if len(text) > 1 and text not in THINKING}
    return Special(told, unknown, {ids[text]: text for text in THINKING if text in ids})


def marked(
    make: Callable[[Sequence[str]], str], fields: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Marked:
    """The text that `make` gives for users' `fields`, in which its own control tokens are marked.

    They are those that are still there when the fields' characters are covered up, one by one.

    Args:
        make: From the fields to the text: a template.
        fields: Texts from data.
        tokenizer: Whose control tokens they are.

    Raises:
        InputError: What the template writes depends so much on the fields that its own part cannot be told.
    """
    return marked_rows(make, [fields], tokenizer)[0]


def marked_rows(
    make: Callable[[Sequence[str]], str],
    rows: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Marked]:
    """As `marked`, for the fields of many examples."""
    special = special_tokens(tokenizer)
    return [_marked(make, fields, special) for fields in rows]


def _marked(make: Callable[[Sequence[str]], str], fields: Sequence[str], special: Special) -> Marked:
    text, pattern = make(fields), special.pattern
    if not isinstance(text, str) or pattern is None or not pattern.search(text):
        return text if isinstance(text, Marked) or not isinstance(text, str) else Marked(text)
    used = "".join(special.ids).lower()
    filler = next((letter for letter in _FILLERS if letter not in used), "\ufffc")
    anywhere = re.compile(pattern.pattern, re.IGNORECASE)
    # All of it; where a template reads what is in its fields, only what could be taken for its own.
    for hidden in (re.compile(r"\S"), anywhere):
        cover = partial(hidden.sub, lambda found: filler * len(found[0]))
        try:
            bare = make([cover(field) for field in fields])
        except Exception:  # code of others, which may choke on anything but the real fields
            continue
        if len(bare) == len(text) and all(
            b == t or b.lower() == filler for b, t in zip(bare, text, strict=True)
        ):
            return Marked(text, [found.span() for found in pattern.finditer(bare)])
    raise InputError(
        f"a text holds {_listed(pattern.findall(text))}, and its template changes its fields so much that it "
        "cannot be told whether the template or the data wrote that. Take it out of the data, or use a "
        "template that puts the fields in as they are"
    )


def tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts to token ids, without the tokens that a tokenizer adds around them.

    Args:
        texts: Of each only what `Marked` says becomes a control token.
        tokenizer: A Hugging Face tokenizer, fast or slow.

    Raises:
        InputError: The tokenizer can read a text only with a control token in it.
    """
    if not texts:
        return []
    if any(getattr(text, "seams", ()) for text in texts):
        return [_parted(text, tokenizer) for text in texts]
    special = special_tokens(tokenizer)
    seen = set(special.ids.values())
    bare = [str(text) for text in texts if not getattr(text, "own", ())]
    # verbose=False: what is longer than the model's context is cut here, so a warning about it would mislead
    plain = iter(tokenizer(bare, add_special_tokens=False, verbose=False)["input_ids"] if bare else ())
    found = list[list[int]]()
    for text in texts:
        ids = None if getattr(text, "own", ()) else next(plain)
        found.append(_as_text(text, tokenizer, special) if ids is None or seen.intersection(ids) else ids)
    return found


def _parted(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not isinstance(text, Marked):
        return tokens([text], tokenizer)[0]
    row = text.pieces(text.seams)
    found = piece_tokens([row], tokenizer)[0] if text.whole else tokens(row, tokenizer)
    return [i for ids in found for i in ids]


def piece_tokens(
    rows: Sequence[Sequence[Marked]], tokenizer: PreTrainedTokenizerBase
) -> list[list[list[int]]]:
    """Texts in pieces to token ids, none of which is of two pieces.

    A piece has the tokens that it has behind the piece before it, which are not always those that it has by
    itself: some tokenizers put a blank in front of any text. Only where a token would be of both pieces, a
    piece is taken by itself.

    Args:
        rows: Of each text its pieces.
        tokenizer: A Hugging Face tokenizer, fast or slow.

    Raises:
        InputError: As `tokens`.
    """
    flat = [piece for row in rows for piece in row]
    alone = iter(tokens(flat, tokenizer))
    apart = [[next(alone) for _ in row] for row in rows]
    pairs = iter(tokens([a + b for row in rows for a, b in pairwise(row)], tokenizer))
    made = []
    for row, own in zip(rows, apart, strict=True):
        found = own[:1]
        for before, ids in pairwise(own):
            both = next(pairs)
            found.append(both[len(before) :] if both[: len(before)] == before else ids)
        made.append(found)
        assert len(found) == len(row)
    return made


def pair_tokens(
    rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> list[list[int]]:
    """Texts, or pairs of them, with the tokens that a tokenizer adds around them and no other control token.

    Args:
        rows: Of one or two texts, all of them data.
        tokenizer: A Hugging Face tokenizer.
        max_length: The most tokens; the longer text of a pair is cut first.

    Raises:
        InputError: As `tokens`.
    """
    cut: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    special = special_tokens(tokenizer)
    seen = set(special.ids.values())
    added = {size: tokenizer.num_special_tokens_to_add(pair=size > 1) for size in {len(row) for row in rows}}
    found: list[list[int]] = [[] for _ in rows]
    for size in added:  # the library takes many texts or many pairs, and not both at once
        places = [place for place, row in enumerate(rows) if len(row) == size]
        columns = [[rows[place][column] for place in places] for column in range(size)]
        whole: list[list[int]] = tokenizer(*columns, verbose=False, **cut)["input_ids"]
        for place, ids in zip(places, whole, strict=True):
            row = rows[place]
            if sum(i in seen for i in ids) != added[size]:
                ids = _pair_as_text(row, tokenizer, special, max_length)
                _check(" ".join(row), ids, special, added[size])
            found[place] = ids
    return found


def _pair_as_text(
    row: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: Special, max_length: int | None
) -> list[int]:
    twin = _twin(tokenizer, special)
    if twin is None:
        cut: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
        ids: list[int] = tokenizer(*row, split_special_tokens=True, verbose=False, **cut)["input_ids"]
        return ids
    if max_length is not None:
        twin.enable_truncation(max_length)
    ids = twin.encode(row[0], row[1] if len(row) > 1 else None).ids
    twin.no_truncation()
    return ids


def _as_text(text: str, tokenizer: PreTrainedTokenizerBase, special: Special) -> list[int]:
    own: tuple[tuple[int, int], ...] = getattr(text, "own", ())
    if _EDGE in text:
        raise InputError(f"a text holds the noncharacter U+10FFFE beside a control token: {text[:60]!r}")
    twin = _twin(tokenizer, special)
    if twin is None:
        ids = _in_pieces(str(text), own, tokenizer, special)
    else:
        renamed, at = "", 0
        for start, end in own:
            renamed += text[at:start] + _name(special.ids[text[start:end]])
            at = end
        ids = twin.encode(renamed + text[at:], add_special_tokens=False).ids
    wanted = sum(special.ids[text[start:end]] in special.controls for start, end in own)
    _check(text, ids, special, wanted)
    return ids


def _check(text: str, ids: Sequence[int], special: Special, wanted: int) -> None:
    """Raises InputError if a control token came out of what is data."""
    found = [i for i in ids if i in special.controls]
    if len(found) > wanted:
        listed = _listed([name for name, place in special.ids.items() if place in found])
        raise InputError(
            f"this tokenizer reads something in the text {text[:60]!r} as its control token {listed} and has "
            "no other spelling for it; take it out of the data, or use another tokenizer"
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _name(place: int) -> str:
    return f"{_EDGE}{place}{_EDGE}"


_TWINS: WeakKeyDictionary[Any, tuple[Special, Tokenizer | None]] = WeakKeyDictionary()


def _twin(tokenizer: PreTrainedTokenizerBase, special: Special) -> Tokenizer | None:
    """The tokenizer with its special tokens renamed to what no text holds; None where it has no such form.

    Splitting special tokens (`split_special_tokens`) is not enough: a Unigram model, or one that splits texts
    at blanks alone, has them in its vocabulary and finds them again. Renamed, with their ids, they are not.
    """
    if not tokenizer.is_fast:
        return None
    known = _TWINS.get(tokenizer)
    if known is None or known[0] != special:
        known = special, _renamed(tokenizer.backend_tokenizer, special.ids)
        _TWINS[tokenizer] = known
    return known[1]


def _renamed(backend: Tokenizer, names: dict[str, int]) -> Tokenizer | None:
    try:
        document = json.loads(backend.to_str())
    except Exception:  # the library's word for parts that are Python code, which has no such form
        return None
    for added in document["added_tokens"]:
        if added["content"] in names:
            # found as it is, wherever it stands: a template writes it nowhere else
            added |= {"content": _name(added["id"]), "normalized": False, "single_word": False}
    model = document["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (piece, score) in the order of the ids
        model["vocab"] = [[_name(names[p]) if p in names else p, score] for p, score in vocabulary]
    else:
        model["vocab"] = {_name(i) if p in names else p: i for p, i in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = _name(names[model["unk_token"]])
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
        model["merges"] = [
            pair for pair in pairs if not {*pair, pair[0] + pair[1].removeprefix(prefix)} & names.keys()
        ]
    return Tokenizer.from_str(json.dumps({**document, "truncation": None, "padding": None}))


def _in_pieces(
    text: str, own: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase, special: Special
) -> list[int]:
    """For tokenizers in Python, which split at their added words first and encode what is between them."""
    others = [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.content not in special.ids
    ]
    words = re.compile("(" + "|".join(map(re.escape, sorted(others, key=len, reverse=True))) + ")")
    ids: list[int] = []

    def spell(piece: str) -> list[int]:
        found: list[int] = tokenizer(
            piece, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return found

    def data(stretch: str) -> None:
        for piece in words.split(stretch) if others else [stretch]:
            if piece in others:
                ids.append(tokenizer.added_tokens_encoder[piece])
            elif piece:
                found = spell(piece)
                if special.controls.intersection(found) and special.pattern is not None:
                    # a vocabulary that holds it whole: parted after its first character it is none
                    parts = special.pattern.sub(lambda hit: hit[0][0] + _EDGE + hit[0][1:], piece).split(
                        _EDGE
                    )
                    found = [i for part in parts for i in spell(part)]
                ids.extend(found)

    at = 0
    for start, end in own:
        data(text[at:start])
        ids.append(special.ids[text[start:end]])
        at = end
    data(text[at:])
    return ids
