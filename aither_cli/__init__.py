"""`aither`, the command line.

`main.py` wires the commands; each has its own file: `up.py`, `status.py`, `tail.py`, `publish.py`.
What they decide is pure and has no I/O: `supervisor.py` (what to do about a child process),
`rendering.py` and `payloads.py` (events as text), `flood.py` (how much of it is shown). What acts
is thin: `house.py` and `minder.py` (processes), `survey.py` and `dialing.py` (calls), `follow.py`,
`ports.py`, `data_dir.py`, `teller.py`.

Nothing here imports a service: services are started as child processes and asked over gRPC.
"""
