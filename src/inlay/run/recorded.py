"""Is the base the one that an adapter recorded? For what a merge does not read as it is stored.

The digest of a tensor that is merged as it lies in its file is taken while it passes by. Codes and scales that a weight
is made of, and tensors whose place a full copy takes, are read here once more, before anything is written.
"""

from __future__ import annotations

from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.checkpoints.spans import BASE
from inlay.plan.types import Entry, Expectation, Plan
from inlay.records.fingerprint import check_recorded


def passing(plan: Plan) -> list[Expectation]:
    """Expectations whose tensor is merged as it is stored."""
    return [e for e in plan.expectations if _is_plain(plan, e.key)]


def _is_plain(plan: Plan, key: str) -> bool:
    entry = plan.entries.get(key)
    return isinstance(entry, Entry) and entry.source.root == BASE and entry.source.made is None


def check_stored(plan: Plan) -> None:
    """Raises InputError for another base than the recorded one, in the tensors that do not pass by."""
    for position, adapter in enumerate(plan.adapters):
        expected = [e for e in plan.expectations if e.adapter == position]
        apart = {e.key: e.digest for e in expected if not _is_plain(plan, e.key)}
        if apart:
            check_recorded(open_checkpoint(plan.roots[BASE]), apart, adapter.name)
