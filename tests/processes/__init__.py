"""Real processes for tests: groups of ranks, and commands forked from a server that has imported everything."""
