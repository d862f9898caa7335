"""The rooms of `bench_stalls.py`: who asks for health, who is asked, and the tables of it.

`prober.py` is the asking process, `guarded.py` a stalled process with somebody else's guard;
`kinds.py`, `outages.py` and `cost.py` measure, `bench_stalls.py` prints.
"""
