"""Reduce a prompt to the few words the world understands.

Knows words, not sentences: which words make a shot is `grammar`'s business.
"""

import difflib
import re

PAD = "<pad>"
KINDS = ("cat", "ghost", "robot", "ball")
COLOURS = ("red", "yellow", "green", "blue", "purple")
ACTIONS = ("walks", "jumps", "waits")
SCENES = ("meadow", "beach", "snow", "night")
AND = "and"
EMPTY = "empty"

# The position is the token id of a word encoder; 0 stays free for padding.
WORDS = (PAD, *COLOURS, *KINDS, *ACTIONS, *SCENES, AND, EMPTY)

SYNONYMS = {
    "cat": ("kitty", "kitten"),
    "ghost": ("phantom", "spirit"),
    "robot": ("android", "droid"),
    "ball": ("orb", "sphere"),
    "red": ("crimson", "scarlet"),
    "yellow": ("golden", "lemon"),
    "green": ("emerald", "jade"),
    "blue": ("azure", "sapphire"),
    "purple": ("violet", "lilac"),
    "walks": ("strolls", "wanders"),
    "jumps": ("hops", "bounces"),
    "waits": ("stands", "rests", "sits"),
    "meadow": ("field", "grassland"),
    "beach": ("shore", "seaside"),
    "snow": ("snowfield", "winter"),
    "night": ("midnight", "dark"),
    "empty": ("deserted", "quiet"),
}

# Accepted from people, never written by `compose`.
_ALSO = {
    "walks": "walk walking walked stroll strolling wander wandering returns return returning enters enter entering",
    "jumps": "jump jumping jumped hop hopping bounce bouncing",
    "waits": "wait waiting waited stand standing rest resting sit sitting stays stay staying",
    "cat": "feline",
    "ghost": "spook",
    "robot": "bot",
    "meadow": "grass pasture",
    "beach": "coast sand",
    "snow": "snowy",
    "night": "nighttime",
    "empty": "nobody nothing noone",
}

FUNCTION_WORDS = frozenset(
    "a an the in on is are at of to by with by there here now then it its once more while still"
    " again back comes come coming appears one".split()
)

_CANONICAL = {word: word for word in WORDS[1:]}
_CANONICAL.update({alias: word for word, aliases in SYNONYMS.items() for alias in aliases})
_CANONICAL.update({alias: word for word, aliases in _ALSO.items() for alias in aliases.split()})


class UnknownWord(ValueError):
    """A prompt holds a word outside the vocabulary; `.word` is that word, `.nearest` up to three known ones."""

    def __init__(self, word: str):
        self.word = word
        self.nearest = tuple(difflib.get_close_matches(word, sorted(_CANONICAL), n=3, cutoff=0.5))
        advice = f"did you mean {' or '.join(self.nearest)}?" if self.nearest else f"use {', '.join(WORDS[1:])}"
        super().__init__(f"unknown word '{word}'; {advice}")

    def __reduce__(self):
        # The message is built from the word, so pickling (worker processes) must hand back the word alone.
        return type(self), (self.word,)


def canonical(prompt: str) -> list[str]:
    """List the canonical content words of a prompt in order; case, punctuation and function words are dropped.
    Raises UnknownWord for the first word it does not know."""
    words = []
    for word in re.findall(r"[^\W_]+(?:'[^\W_]+)?", prompt.lower()):
        if word in FUNCTION_WORDS:
            continue
        if word not in _CANONICAL:
            raise UnknownWord(word)
        words.append(_CANONICAL[word])
    return words
