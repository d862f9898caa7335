"""The log in NATS JetStream: many Flux nodes, one bus."""
