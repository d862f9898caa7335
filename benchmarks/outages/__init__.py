"""Small faithful models of the two outages that Aither was born from; `bench_stalls.py` runs them.

The subjects (`old_heartbeat.py`, `old_orchestrator.py`) do what the old services did, HTTP and all;
the neighbours they call are well. Nothing here is an example to follow.
"""
