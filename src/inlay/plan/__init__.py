"""Deciding, as data: what will be written, from which bytes, by which steps."""
