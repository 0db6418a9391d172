"""Module names of a model in memory ↔ keys of a checkpoint on disk."""
