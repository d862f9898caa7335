"""Which of several Flux nodes a client talks to: one at a time, the next one when it fails."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from aither_sdk.addresses import refuse_own, split_address
from aither_sdk.channels import open_channel
from aither_sdk.errors import FieldViolation, InvalidArgument

Addresses = str | Sequence[str]
"""host:port, several of them separated by commas, or a sequence of them."""


def split_addresses(addresses: Addresses) -> tuple[str, ...]:
    """Each address once, in order. Raises InvalidArgument for a malformed one, and for none."""
    given = addresses.split(",") if isinstance(addresses, str) else addresses
    found = tuple(dict.fromkeys(address.strip() for address in given if address.strip()))
    if not found:
        told = 'no address; use something like "127.0.0.1:7401"'
        raise InvalidArgument.of([FieldViolation("address", told)])
    for address in found:
        split_address(address)
    return found


class Dialler:
    """One open channel, to one of the addresses; they are nodes of one bus, so any will do.

    The order is kept: a client begins with the first, so give each client its own order to spread
    them.
    """

    def __init__(self, addresses: Addresses) -> None:
        self.addresses = split_addresses(addresses)
        self._index = 0
        self._channel: grpc.aio.Channel | None = None

    @property
    def address(self) -> str:
        """The one that is dialled."""
        return self.addresses[self._index]

    @property
    def channel(self) -> grpc.aio.Channel:
        assert self._channel is not None, "open() comes first"
        return self._channel

    def open(self) -> None:
        """Makes the channel, which connects when first used. Raises SelfDialError."""
        for address in self.addresses:
            refuse_own(address)
        self._channel = open_channel(self.address)

    async def move_on(self, *, afresh: bool = False) -> None:
        """Takes the next address, if there is another one; `afresh`: a connection of its own in any
        case, for the one there is may be half open."""
        if afresh or len(self.addresses) > 1:
            before = self._channel
            self._index = (self._index + 1) % len(self.addresses)
            self._channel = open_channel(self.address)
            if before is not None:
                await before.close(None)

    async def aclose(self) -> None:
        if self._channel is not None:
            await self._channel.close(None)
