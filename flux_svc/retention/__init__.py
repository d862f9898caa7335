"""What leaves the log, and when: bounds of the whole log, rules by subject, and expiry.

`rules.py` judges, `timekeeper.py` says what time to believe, `sweeper.py` asks the log and acts.
"""

from __future__ import annotations

from flux_svc.retention.sweeper import Retention, RetentionStatistics

__all__ = ["Retention", "RetentionStatistics"]
