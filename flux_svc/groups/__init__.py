"""Consumer groups: one port (`base.py`) and what fulfils it."""
