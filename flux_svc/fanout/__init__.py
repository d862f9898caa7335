"""Fan-out: from committed records to the bytes that each subscriber is sent.

`view.py` keeps the newest matching frames of one filter and joins them once for all who stand at
the same position; `routes.py` finds the views of a subject; `pacer.py` decides when the waiting are
woken; `hub.py` owns them and is fed by the log's commits; `subscription.py` drives one subscriber
over log and view.
"""
