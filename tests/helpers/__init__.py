"""What several test files share: worlds of processes, encoders on disk, oracles, servers."""
