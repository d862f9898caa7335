"""Following Flux: the subscriber, its stream, and where it stands."""
