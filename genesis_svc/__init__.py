"""Genesis, the orchestrator: subscribes to one Flux stream, plans on a tick, and serves nothing.

Read in this order: `world` (what it knows), `tick` (how it judges), `worker` (who acts),
`engine` (the shell around them), `__main__` (wiring).
"""
