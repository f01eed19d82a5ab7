"""Goodput of a job on many replicas under failures, by simulation: no process is started and nothing is trained."""
