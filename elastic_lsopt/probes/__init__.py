"""Probes: what the landscape around the weights looks like. One measure a file, named as in its paper."""
