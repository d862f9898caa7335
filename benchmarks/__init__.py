"""Measurements, each beside the peer or the naive way in one run. `make bench` runs them all."""
