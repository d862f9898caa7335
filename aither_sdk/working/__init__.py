"""Working off a consumer group: the worker, its membership, its leases."""
