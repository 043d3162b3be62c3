"""Process groups: launcher environment, collectives, heartbeat, stragglers."""
