"""Averages: one paper a file, and their registry."""

from elastic_lsopt.averages.registry import build, get, names, register

__all__ = ["build", "get", "names", "register"]
