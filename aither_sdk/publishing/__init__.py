"""Publishing to Flux: the publisher, its stream, what it keeps and whom it answers."""
