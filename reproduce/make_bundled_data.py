"""Generate the bundled instruction data set: ten kinds of small task whose answers can be checked exactly.

    python reproduce/make_bundled_data.py            # writes fedtune/data/bundled_{train,test}.jsonl

The same seed gives the same bytes. Every instance (skill and arguments) occurs once in train and test
together, and ``reproduce/pretrain_bundled.py`` draws its corpus around them, so no test answer was memorised.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SEED = 2
TRAIN_PER_SKILL = 180
TEST_PER_SKILL = 36
DATA_FOLDER = Path(__file__).resolve().parent.parent / "fedtune" / "data"

# A word belongs to exactly one class, so "which word is a fruit" has one answer (so no "orange").
CLASSES: dict[str, tuple[str, ...]] = {
    "an animal": ("dog", "cat", "horse", "cow", "sheep", "goat", "bear", "wolf", "lion", "mouse"),
    "a fruit": ("apple", "pear", "plum", "grape", "lemon", "mango", "melon", "cherry", "peach", "banana"),
    "a colour": ("red", "blue", "green", "yellow", "black", "white", "brown", "pink", "purple", "grey"),
    "a tool": ("hammer", "saw", "drill", "axe", "spade", "rake", "chisel", "file", "wrench", "shovel"),
    "a garment": ("shirt", "coat", "hat", "scarf", "glove", "sock", "skirt", "jacket", "dress", "belt"),
    "a vehicle": ("car", "bus", "train", "boat", "truck", "tram", "bike", "plane", "ship", "van"),
    "a metal": ("iron", "gold", "silver", "copper", "zinc", "tin", "lead", "nickel", "steel", "brass"),
    "a tree": ("oak", "pine", "birch", "elm", "ash", "maple", "willow", "cedar", "beech", "fir"),
}
OPPOSITE_PAIRS: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("old", "young"), ("fast", "slow"),
    ("high", "low"), ("wet", "dry"), ("hard", "soft"), ("open", "closed"), ("full", "empty"),
    ("light", "dark"), ("early", "late"), ("rich", "poor"), ("happy", "sad"), ("strong", "weak"),
    ("thick", "thin"), ("near", "far"), ("clean", "dirty"), ("loud", "quiet"), ("long", "short"),
    ("true", "false"), ("day", "night"), ("start", "end"),
)  # fmt: skip
CLASS_OF = {word: name for name, words in CLASSES.items() for word in words}
OPPOSITE = {a: b for x, y in OPPOSITE_PAIRS for a, b in ((x, y), (y, x))}
WORDS = tuple(CLASS_OF) + tuple(OPPOSITE)
LETTERS = "abcdefghijklmnopqrstuvwxyz"

Arguments = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Skill:
    """One kind of task.

    Attributes:
        wordings: Instructions of the instruction set; ``{}`` stands for the first argument.
        sizes: Sizes drawn for the instruction set: list items; for ``add``, ``largest`` the highest number.
        draw: ``(rng, size) -> arguments``.
        show: ``arguments -> input`` text.
        solve: ``arguments -> output`` text.
    """

    wordings: tuple[str, ...]
    sizes: tuple[int, ...]
    draw: Callable[[random.Random, int], Arguments]
    show: Callable[[Arguments], str]
    solve: Callable[[Arguments], str]

    def instruction(self, wording: str, arguments: Arguments) -> str:
        """The wording with its blank filled in."""
        return wording.format(arguments[0])


def _words(rng: random.Random, size: int) -> Arguments:
    return tuple(rng.sample(WORDS, size))


def _letters(rng: random.Random, size: int) -> Arguments:
    return tuple(rng.sample(LETTERS, size))


def _numbers(count: int) -> Callable[[random.Random, int], Arguments]:
    def draw(rng: random.Random, size: int) -> Arguments:
        return tuple(str(number) for number in rng.sample(range(1, size + 1), count))

    return draw


def _pairs(rng: random.Random, size: int) -> Arguments:
    """The key asked for, then ``key=value`` pairs."""
    keys = rng.sample(WORDS, size)
    return (rng.choice(keys), *(f"{key}={rng.randrange(100)}" for key in keys))


def _class_and_words(rng: random.Random, size: int) -> Arguments:
    """A class, then words of which exactly one belongs to it."""
    wanted = rng.choice(list(CLASSES))
    others = [word for word in WORDS if CLASS_OF.get(word) != wanted]
    words = [rng.choice(CLASSES[wanted]), *rng.sample(others, size - 1)]
    rng.shuffle(words)
    return (wanted, *words)


def _list(label: str, separator: str = ", ", start: int = 0) -> Callable[[Arguments], str]:
    return lambda arguments: f"{label}: {separator.join(arguments[start:])}"


def _lookup(arguments: Arguments) -> str:
    return dict(pair.split("=") for pair in arguments[1:])[arguments[0]]


# The label in front ("Words:") means that every list item follows a blank: one token a word or letter.
SKILLS: dict[str, Skill] = {
    "add": Skill(
        ("Add the numbers.", "What is the sum of the numbers?"),
        (20, 60),
        _numbers(2),
        _list("Numbers"),
        lambda a: str(int(a[0]) + int(a[1])),
    ),
    "count": Skill(
        ("How many words are there?", "Count the words in the list."),
        (2, 3, 4, 5, 6, 7, 8),
        _words,
        _list("Words"),
        lambda a: str(len(a)),
    ),
    "largest": Skill(
        ("Which number is the largest?", "Name the biggest number."),
        (40, 99),
        _numbers(3),
        _list("Numbers"),
        lambda a: max(a, key=int),
    ),
    "last": Skill(
        ("Name the last word of the list.", "Which word comes last?"),
        (3, 4, 5, 6),
        _words,
        _list("Words"),
        lambda a: a[-1],
    ),
    "lookup": Skill(
        ("What is the value of {}?", "Find {} and give its number."),
        (3, 4),
        _pairs,
        _list("Pairs", start=1),
        _lookup,
    ),
    "next": Skill(
        ("Write the next letter for each letter.", "Move each letter one step on."),
        (2, 3),
        lambda rng, size: tuple(rng.sample(LETTERS[:-1], size)),
        _list("Letters", " "),
        lambda a: " ".join(LETTERS[LETTERS.index(letter) + 1] for letter in a),
    ),
    "opposite": Skill(
        ("Write the opposite of each word.", "Turn each word into its opposite."),
        (2,),
        lambda rng, size: tuple(rng.sample(tuple(OPPOSITE), size)),
        _list("Words"),
        lambda a: ", ".join(OPPOSITE[word] for word in a),
    ),
    "pick": Skill(
        ("Which word is {}?", "Find {} in the list."),
        (3, 4, 5),
        _class_and_words,
        _list("Words", start=1),
        lambda a: next(word for word in a[1:] if CLASS_OF.get(word) == a[0]),
    ),
    "reverse": Skill(
        ("Reverse the letters.", "Write the letters in reverse order."),
        (3, 4, 5),
        _letters,
        _list("Letters", " "),
        lambda a: " ".join(a[::-1]),
    ),
    "sort": Skill(
        ("Sort the letters.", "Put the letters in alphabetical order."),
        (3, 4, 5),
        _letters,
        _list("Letters", " "),
        lambda a: " ".join(sorted(a)),
    ),
}

Instance = tuple[str, Arguments]  # (skill, arguments): what must be disjoint
ORDERLESS = frozenset({"add", "largest", "pick", "sort"})


def instance(skill: str, arguments: Arguments) -> Instance:
    """What counts as the same task: 3 + 4 is 4 + 3, so arguments whose order changes nothing are sorted."""
    return skill, tuple(sorted(arguments)) if skill in ORDERLESS else arguments


def instruction_set(
    seed: int = SEED,
) -> tuple[list[dict[str, str]], list[dict[str, str]], frozenset[Instance]]:
    """Draw the instruction set.

    Returns:
        (train, test, instances): examples with ``instruction``, ``input``, ``output`` and ``category``,
        shuffled and balanced by category, and every instance used, once each.
    """
    rng = random.Random(f"fedtune bundled instructions {seed}")
    used: set[Instance] = set()
    parts: list[list[dict[str, str]]] = []
    for per_skill in (TRAIN_PER_SKILL, TEST_PER_SKILL):
        part = []
        for name, skill in SKILLS.items():
            for number in range(per_skill):
                # Wordings and sizes are dealt in turn, so that the parts are balanced in both.
                wording = skill.wordings[number % len(skill.wordings)]
                size = skill.sizes[number // len(skill.wordings) % len(skill.sizes)]
                arguments = skill.draw(rng, size)
                while instance(name, arguments) in used:
                    arguments = skill.draw(rng, size)
                used.add(instance(name, arguments))
                part.append(
                    {
                        "instruction": skill.instruction(wording, arguments),
                        "input": skill.show(arguments),
                        "output": skill.solve(arguments),
                        "category": name,
                    }
                )
        rng.shuffle(part)
        parts.append(part)
    return parts[0], parts[1], frozenset(used)


def as_json_lines(examples: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(example) + "\n" for example in examples).encode()


def main() -> None:
    train, test, _ = instruction_set()
    for name, examples in (("train", train), ("test", test)):
        path = DATA_FOLDER / f"bundled_{name}.jsonl"
        path.write_bytes(as_json_lines(examples))
        print(f"{path.name}: {len(examples)} examples, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
