"""The newest event of every subject, in pieces: memory does not grow with the number of subjects.

Between asking where they stand and fetching them an event may be superseded and removed. Then the
subject has a newer one, and an answer that left it out would say that there is none.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from aither_sdk.errors import ResourceExhausted, Unavailable
from flux_svc.logs.base import EventLog, Matches

_FETCHED_EVENTS = 256
"""Events that are held at once."""
_GATHER_ROUNDS = 64
"""Each round asks only for what was superseded during the one before it: milliseconds."""
NOBODY: frozenset[str] = frozenset()


class Piece(NamedTuple):
    """Some events of a state, rising."""

    payload: bytes
    events: int
    position: int
    """All that was asked for up to this sequence has come, or will not."""
    gone: Sequence[int] = ()
    """What was asked for and is no longer held, of this piece and those after it."""


async def pieces(
    log: EventLog,
    sequences: Sequence[int],
    *,
    exclude_sources: frozenset[str] = NOBODY,
    max_events: int,
    max_bytes: int,
) -> AsyncGenerator[Piece, None]:
    """The events of rising `sequences`, each piece small enough for a message (a larger event goes
    alone). A piece may be empty. Raises what `EventLog.fetch` raises."""
    step = min(max_events, _FETCHED_EVENTS)
    for first in range(0, len(sequences), step):
        asked = sequences[first : first + step]
        found = await log.fetch(asked, exclude_sources=exclude_sources)
        gone = found.gone
        start = size = events = 0
        for sequence, frame_size in zip(found.sequences, found.sizes, strict=True):
            if events and size + frame_size > max_bytes:
                yield Piece(found.payload[start : start + size], events, sequence - 1, gone)
                start, size, events, gone = start + size, 0, 0, ()
            size += frame_size
            events += 1
        yield Piece(found.payload[start:], events, asked[-1], gone)


async def gather(log: EventLog, matches: Matches, *, max_bytes: int) -> tuple[bytes, int]:
    """The frames of a whole state, joined, and the position after which it is the state.

    Raises ResourceExhausted when it is larger than `max_bytes`, Unavailable when it changes faster
    than it can be read.
    """
    frames: dict[int, bytes] = {}
    for _ in range(_GATHER_ROUNDS):
        state = await log.newest(matches)
        frames = {s: frames[s] for s in state.sequences if s in frames}
        size = sum(map(len, frames.values()))
        wanted = [sequence for sequence in state.sequences if sequence not in frames]
        for first in range(0, len(wanted), _FETCHED_EVENTS):
            found = await log.fetch(wanted[first : first + _FETCHED_EVENTS])
            frames.update(zip(found.sequences, found.frames, strict=True))
            size += len(found.payload)
            if size > max_bytes:
                raise ResourceExhausted(
                    f"the state of {len(state.sequences)} subjects is more than the {max_bytes} "
                    "bytes of one answer; use narrower filters, or Subscribe with last_per_subject",
                    reason="ANSWER_TOO_LARGE",
                )
        if len(frames) == len(state.sequences):
            return b"".join(frames[sequence] for sequence in state.sequences), state.position
    raise Unavailable(
        f"the state of {len(frames)} subjects is superseded and removed faster than it can be "
        "read; repeat, or Subscribe with last_per_subject",
        reason="STATE_CHANGING",
        retry_after_s=0.1,
    )
