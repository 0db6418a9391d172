"""Checking a merged directory, made by `inlay` or by any other tool.

Nothing here imports `run`: the expected weights are computed again, whole rows in float64 by the plain
formula, and what float64 cannot decide is decided exactly.
"""
