"""Pulse, the heartbeat: asks everything in the fleet how it is, and tells once a second.

`__main__` wires; `servicer` answers; `roster` knows who is watched, `prober` asks them when
`schedule` says so, `board` holds what is thought of them by the rules of `verdict`, `tick`
publishes it. Checks live in `checks`, one kind a file.
"""
