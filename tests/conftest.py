"""What holds for every test."""

from __future__ import annotations

from hypothesis import settings

# Machines are busy at times: how long an example takes says nothing about what it shows.
settings.register_profile("aither", deadline=None)
settings.load_profile("aither")
