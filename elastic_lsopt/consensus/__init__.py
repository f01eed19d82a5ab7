"""Rules of consensus, by which replicas that drift apart pull on each other: one paper a file, and their registry."""

from elastic_lsopt.consensus.registry import build, get, names, register

__all__ = ["build", "get", "names", "register"]
