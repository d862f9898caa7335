"""Groups that the nodes over one JetStream share.

One node at a time is the *keeper*: it runs the local groups of `groups/local` over a store in a
stream of their own. The others are *guests*: what their members say and are told travels over NATS
(`link.py`). The keeper's place is a message in that stream, the fence; everything it stores is
stored under the condition that this message is still the newest of its subject, so that a keeper
who was replaced and does not know it changes nothing.
"""
