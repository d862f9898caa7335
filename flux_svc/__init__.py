"""Flux, the event bus: one ordered, durable log of typed events and cursors that follow it.

The floors, each importing only downward: `__main__` (wiring) -> registration -> servicer ->
publishing, fanout -> validation -> logs (the port `logs/base.py` and what fulfils it) -> sequencer
-> frames.
"""
