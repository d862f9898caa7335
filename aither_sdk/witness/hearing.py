"""Whether the witness still lives: one that is stopped, or hangs, answers no probe and does not die
by itself. Pure."""

from __future__ import annotations

LOOK_S = 2.5
"""Between two looks at the word that it leaves in the cell five times a second."""
_LOOKS = 4
"""In a row without a new word, until it is given up: 10 s."""
_LATE = 2.0
"""A look that comes so many times later than it should says nothing: this process, or the machine,
stood still itself."""


class Hearing:
    """Takes looks and says when the witness is to be given up."""

    def __init__(self, now_ns: int, word_ns: int) -> None:
        self._looked_ns = now_ns
        self._word_ns = word_ns
        self._silent_looks = 0

    def looks(self, now_ns: int, word_ns: int) -> bool:
        """Whether it is dumb. `word_ns`: when it last left its word, by the same clock."""
        on_time = now_ns - self._looked_ns < LOOK_S * _LATE * 1e9
        said_nothing = word_ns == self._word_ns
        self._looked_ns, self._word_ns = now_ns, word_ns
        self._silent_looks = self._silent_looks + 1 if on_time and said_nothing else 0
        return self._silent_looks >= _LOOKS
