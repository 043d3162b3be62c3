"""Processes: the launcher's environment, collectives, the heartbeat, stragglers."""
