"""Assign the parts of a source to splits by their names: one rule for all kinds of sources.

A name is the path of a file below its folder or of a member of a shard, the key of an array, or a
name in a hub. Its outermost component that contains a word of exactly one split decides. The words
are train or training; validation, valid, val or dev; test, testing or eval; in any case, as a part
of the name (`Train/`, `x_train`, `name.test.txt`, `split=val`). A name that contains "train" or
"test" but no such word is an error until it is declared.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import NamedTuple

#: the splits, and the words that mean them
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "t10k"),
}
#: names of the splits
SPLITS = tuple(WORDS)
#: the split of each word
MEANING = {word: split for split, words in WORDS.items() for word in words}
#: t10k is MNIST's own word; x and y may stand before a word without a sign between them
WORD = re.compile(r"t10k|(?<![a-z])[xy](?=(?:train|test|val|valid|dev)(?![a-z]))|[a-z]+", re.I)
CAPITALS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
SALT = 0x6E656C626F  # of the seed of a split that is drawn
NONE = "none"  # declares that names do not mean splits
LIKELY = re.compile("train|test|val|dev|t10k", re.I)  # a quick test that most names fail
#: words that contain "train" or "test" without meaning a split
ORDINARY = re.compile(
    r"(?<![a-z])(?:(?:la|grea|fas|shor|ligh|brigh|smar|ho|we)test|contests?|protest(?:s|ers?|ant)?|attest|"
    r"detest|testament|testimon(?:y|ial)s?|intestin(?:e|es|al)|testicular|testis|"
    r"trains|trainers?|(?:re|con)?strain(?:s|ts?)?)(?![a-z])",
    re.I,
)
ADVICE = "declare the splits, as in --splits train=A,test=B, or --splits none to draw them"
SHOWN = 3  # names in a message

#: the names, or patterns of names, of each split; {} if names do not mean splits
Declared = Mapping[str, Sequence[str]]


class Groups(NamedTuple):
    """Result of `group`.

    Args:
        parts: indices of the names of each split, or of "all".
        rests: each name without the component that decided.
        notes: notes on what was guessed or left out.
    """

    parts: dict[str, list[int]]
    rests: list[str]
    notes: list[str]


def declare(splits: str | Mapping[str, str | Sequence[str]] | None) -> Declared | None:
    """Parse a declaration of splits: "train=A,test=B", "none", or split to name or names.

    >>> declare("train=a,val=b*,train=c")
    {'train': ('a', 'c'), 'validation': ('b*',)}

    Raises:
        ValueError: it is not such a declaration.
    """
    if splits is None or splits == NONE:
        return None if splits is None else {}
    if isinstance(splits, str):
        pairs = [part.partition("=")[::2] for part in splits.split(",")]
    else:
        pairs = [
            (split, name)
            for split, names in splits.items()
            for name in ([names] if isinstance(names, str) else names)
        ]
    found: dict[str, tuple[str, ...]] = {}
    for word, name in pairs:
        split = MEANING.get(word.strip())
        if split is None or not name:
            raise ValueError(
                f"splits are declared as train=A,validation=B,test=C, or none; got {splits!r}"
            )
        found[split] = (*found.get(split, ()), name.strip().strip("/"))
    return found


def words_of(name: str) -> list[str]:
    """Return the words of a name, in lower case."""
    return [word.lower() for word in WORD.findall(CAPITALS.sub(" ", name))]


@lru_cache(2**16)
def split_of(name: str) -> str | None:
    """Return the one split whose words a name contains; None if there is none, or several.

    >>> [split_of(name) for name in ("x_train", "XTest2", "latest", "train_test", "7.VAL.txt")]
    ['train', 'test', None, None, 'validation']
    """
    words = words_of(name) if LIKELY.search(name) else ()
    found = {MEANING[word] for word in words if word in MEANING}
    return found.pop() if len(found) == 1 else None


def group(
    names: Sequence[str],
    source: object,
    declared: Declared | None = None,
    outside_what: str = "files outside the splits",
) -> Groups:
    """Assign names to splits, or to "all" if no name means a split; leave out those of no split.

    Args:
        names: paths with "/", keys or names.
        source: for messages.
        declared: the user's declaration.
        outside_what: how the note on names of no split calls them.

    Raises:
        ValueError: a name contains "train" or "test" but belongs to no split; some names belong
            to one split and others to none; or two names each mean a whole split.
    """
    if declared is not None:
        return _as_declared(names, source, declared, outside_what) if declared else _all(names)
    places = [_decided(name) for name in names]
    parts: dict[str, list[int]] = {split: [] for split in SPLITS}
    for i, place in enumerate(places):
        if place is not None:
            parts[place[0]].append(i)
    parts = {split: found for split, found in parts.items() if found}
    outside = [name for name, place in zip(names, places, strict=True) if place is None]
    for name in outside:
        refuse_unclear(name, source)
    if not parts:
        return _all(names)
    if outside and len(parts) == 1:
        split = next(iter(parts))
        raise ValueError(
            f"{names[parts[split][0]]} in {source} is of the {split} split by its name, and"
            f" {_few(outside)} of none; {ADVICE}"
        )
    notes = _left_out(outside, parts, outside_what)
    components_of = {}
    for split, found in parts.items():
        components = dict.fromkeys(place[1] for i in found if (place := places[i]) is not None)
        whole = [c for word in WORDS[split] for c in components if c.lower() == word]
        if len(whole) > 1:
            raise ValueError(
                f"{whole[0]} and {whole[1]} both name the {split} split of {source}; keep one,"
                f" or {ADVICE}"
            )
        components_of[split] = [c for c in components if not _plain(c, split)]
    if any(components_of.values()):
        lines = "; ".join(f"{split} is {_few(cs)}" for split, cs in components_of.items() if cs)
        notes.append(f"splits by name: {lines}; --splits declares others")
    return Groups(parts, [p[2] if p else n for p, n in zip(places, names, strict=True)], notes)


def refuse_unclear(name: str, source: object) -> None:
    """Raise ValueError if a name contains "train" or "test" but no word that decides its split."""
    word = re.search("train|test", ORDINARY.sub("", name), re.I)
    if word is not None and _decided(name) is None:
        raise ValueError(
            f"{name} in {source} holds {word[0]!r} and is of no split by its words; {ADVICE}"
        )


def one_each(groups: Groups, names: Sequence[str], source: object) -> dict[str, str]:
    """Return the one name of each split, or of "all".

    Raises:
        ValueError: two names belong to the same split.
    """
    for split, places in groups.parts.items():
        if len(places) > 1:
            both = sorted((names[i] for i in places), key=lambda name: _rank(name, split))
            first, second = both[:2]
            raise ValueError(
                f"{first} and {second} both name the {split} split of {source}; keep one, or"
                f" {ADVICE}"
            )
    return {split: names[places[0]] for split, places in groups.parts.items()}


def _rank(name: str, split: str) -> int:
    """Return the index of the word of a split that a name contains."""
    return next((i for i, w in enumerate(WORDS[split]) if re.search(rf"{w}(?![a-z])", name)), 0)


def _decided(name: str) -> tuple[str, str, str] | None:
    """Return the split of a name, the component that decides it, and the name without it."""
    folder, slash, last = name.rpartition("/")
    above = _of_folder(folder) if slash else None
    if above is not None:
        return above[0], above[1], above[2] + last
    split = split_of(last)
    return None if split is None else (split, last, name)


@lru_cache(2**12)
def _of_folder(folder: str) -> tuple[str, str, str] | None:
    """Return the same for a folder; the rest ends in "/" unless it is empty."""
    components = folder.split("/")
    for i, component in enumerate(components):
        split = split_of(component)
        if split is not None:
            rest = components[:i] + components[i + 1 :]
            return split, component, "".join(f"{each}/" for each in rest)
    return None


def _plain(component: str, split: str) -> bool:
    """Return whether a component is a plain word of a split, which needs no note:
    train-000.tar."""
    return re.split(r"[^a-z]", component)[0] in WORDS[split] and component[:1].islower()


def _all(names: Sequence[str]) -> Groups:
    return Groups({"all": list(range(len(names)))}, list(names), [])


def _as_declared(
    names: Sequence[str], source: object, declared: Declared, outside_what: str
) -> Groups:
    parts: dict[str, list[int]] = {}
    rests, outside = list(names), []
    used: set[tuple[str, str]] = set()
    for i, name in enumerate(names):
        fits = [(s, p) for s, patterns in declared.items() for p in patterns if _fitting(name, p)]
        used.update(fits)
        if len({split for split, _ in fits}) > 1:
            raise ValueError(
                f"{name} in {source} is declared of the {fits[0][0]} and of the {fits[-1][0]}"
                " split; name it in one"
            )
        if not fits:
            outside.append(name)
            continue
        parts.setdefault(fits[0][0], []).append(i)
        place = _fitting(name, fits[0][1])
        rests[i] = name.removeprefix(f"{place}/")
    for split, patterns in declared.items():
        for pattern in patterns:
            if (split, pattern) not in used:
                raise ValueError(
                    f"{source} has no {pattern!r}, which is declared its {split} split; it has"
                    f" {_few(_heads(names))}"
                )
    parts = {split: parts[split] for split in SPLITS if split in parts}
    return Groups(parts, rests, _left_out(outside, parts, outside_what))


def _fitting(name: str, pattern: str) -> str:
    """Return the part of a name that matches a declared pattern, with or without its type, or
    ""."""
    components = name.split("/")
    for i in range(1, len(components) + 1):
        place = "/".join(components[:i])
        if pattern in (place, place.rpartition(".")[0]) or fnmatchcase(place, pattern):
            return place
    return ""


def _left_out(outside: Sequence[str], parts: Mapping[str, object], what: str) -> list[str]:
    if not outside:
        return []
    return [f"{len(outside)} {what} {', '.join(parts)} left out: {_few(outside)}"]


def _heads(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[0] for name in names))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", .." if len(names) > SHOWN else "")
