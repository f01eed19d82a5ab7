"""The nearest valid name to a mistyped one: the last words of every "unknown key" message."""

from collections.abc import Collection
from difflib import get_close_matches


def did_you_mean(word: str, known: Collection[str]) -> str:
    """`; did you mean 'learning_rate'?`; where none is near, the list of known names if it is short.

    >>> did_you_mean("learning_rte", ["learning_rate", "max_steps"])
    "; did you mean 'learning_rate'?"
    """
    word = word.lower()
    near = get_close_matches(word, known, n=1, cutoff=0.6) or [name for name in known if name.startswith(f"{word}_")]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known)) or '(none)'}." if len(known) <= 12 else "."
