"""Carrying out a plan: one shard at a time, block by block, in bounded memory."""
