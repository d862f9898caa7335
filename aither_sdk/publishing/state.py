"""How a publisher stands: what `Publisher.statistics()` answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublisherStatistics:
    """Counts since the publisher was opened, and how it stands."""

    published: int
    """Events acknowledged by Flux as stored, duplicates not counted."""
    duplicates: int
    """Events that Flux had stored before; after a broken stream some are to be expected."""
    refused: int
    """Events refused, by Flux or because the buffer was full."""
    dropped: int
    """Events taken and given up: pushed out by `drop_oldest`, or unanswered at close."""
    retried: int
    """Events sent again after a broken stream, each time counted."""
    buffered_events: int
    """Events taken and not answered, sent or not."""
    buffered_bytes: int
    """Their bytes."""
    reconnects: int
    """Streams opened after the first one."""
    connected: bool
    """Whether there is a stream that Flux has answered on. False before the first event."""
