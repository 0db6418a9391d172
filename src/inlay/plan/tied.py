"""Input embedding and output head that are one tensor in memory.

An adapter on one end changes one function of the model; the shared tensor serves both. To keep what the
adapted model computes, the ends come apart: the head is written under its own name and
`tie_word_embeddings` becomes false. They stay together where the adapter meant both ends: trained
token rows, `ensure_weight_tying`, or a change that is the same on both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inlay.checkpoints.checkpoint import Checkpoint
from inlay.errors import Problem
from inlay.keys import families
from inlay.plan.combine import Draft
from inlay.plan.placer import Contribution, embedding_key
from inlay.plan.steps import AnyStep, Step

TYING_NAMES = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES
HEADLESS_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Untied:
    """Keys that get tensors of their own -> the keys whose values they start from: the head, perhaps its bias."""

    values: Mapping[str, str]


def settle_ties(
    base: Checkpoint,
    contributions: Sequence[Contribution],
    drafts: dict[str, Draft],
    problems: list[Problem],
    notes: list[str],
) -> Untied | None:
    """Decide whether tied ends come apart; drafts of both ends are brought up to date."""
    keys = base.tensors.keys()
    embedding = embedding_key(base)
    if embedding is None or not families.is_tied(base.config, keys):
        return None
    head = families.head_key(base.config, keys)
    ends = [end for end in (embedding, head) if end and end in drafts]
    if not ends:
        return None
    if all(c.adapter.config.task_type in HEADLESS_TASKS for c in contributions if c.keys & set(ends)):
        notes.append(f"{embedding} is tied to a head that the adapter's task does not use; the tie is kept")
        return None
    if head is None:
        if families.has_head(base.config):
            problems.append(
                Problem(
                    embedding, "is tied to an output head whose name is not known for this class; untie the base first"
                )
            )
        return None
    untied = _settle(embedding, head, head in keys, contributions, drafts, notes)
    if untied is None:
        return None
    bias = head.removesuffix("weight") + "bias"
    stored_bias = families.TIED_BIASES.get(bias)
    if stored_bias not in keys or bias in keys:
        return untied
    drafts[bias] = drafts[stored_bias].copy() if stored_bias in drafts else Draft()
    return Untied({**untied.values, bias: stored_bias})


def _settle(
    embedding: str,
    head: str,
    stored: bool,
    contributions: Sequence[Contribution],
    drafts: dict[str, Draft],
    notes: list[str],
) -> Untied | None:
    one, other = drafts.pop(embedding, Draft()), drafts.pop(head, Draft())
    both_meant = {c.position for c in contributions if _heeded_tying(c, {embedding, head})}
    # A copy that modules_to_save does not list is the model's own embedding, resized before training.
    own_copies = {c.position for c in contributions if {embedding, head} & (c.copies.keys() - c.saved)}
    one, other = (
        _share(one, other, both_meant, own_copies),
        _share(other, one, both_meant, own_copies),
    )
    if _same(one, other, both_meant, own_copies):
        drafts[embedding] = one
        if stored:
            drafts[head] = other.copy()
        notes.append(f"{embedding} and {head} stay tied: the change is meant for both")
        return None
    if one.changed:
        drafts[embedding] = one
    drafts[head] = other
    notes.append(
        f"{head} is written as a tensor of its own (tie_word_embeddings: false): the adapter changes "
        f"{'both ends differently' if one.changed and other.changed else 'one end only'}"
    )
    return Untied({head: embedding})


def _heeded_tying(found: Contribution, ends: set[str]) -> bool:
    """Whether PEFT did as `ensure_weight_tying` says: of others than these names it trains one end, unless both were
    targeted, and then the file has a pair for each."""
    touched = found.keys & ends
    named = any(key.removesuffix(".weight").rpartition(".")[2] in TYING_NAMES for key in touched)
    return found.adapter.config.ensure_weight_tying and (named or len(touched) == len(ends))


def _share(end: Draft, opposite: Draft, both_meant: set[int], own_copies: set[int]) -> Draft:
    """`end` with what was meant for both ends and stands at the opposite one only.

    With `ensure_weight_tying` the file may hold the pair once, or once for each end: it acts once.
    """
    shared = end.copy()
    here = {step.adapter for step in end.steps}
    shared.steps += [step for step in opposite.steps if step.adapter in both_meant and step.adapter not in here]
    shared.steps.sort(key=lambda step: step.adapter)
    if opposite.source is not None and end.source is None:
        position = int(opposite.source.root.removeprefix("adapter"))
        if position in both_meant or position in own_copies:
            shared.source = opposite.source
    if not end.patches:
        shared.patches = list(opposite.patches)
    return shared


def _same(one: Draft, other: Draft, both_meant: set[int], own_copies: set[int]) -> bool:
    """Whether both ends get the same values: from the same tensors, or from what stands for both, saved twice."""

    def _own_parts(step: AnyStep, shared: bool) -> object:
        if isinstance(step, Step):
            return step.scaling, step.rank, None if shared else step.right.ref
        return None if shared else step.refs

    def identity(draft: Draft) -> tuple[object, ...]:
        source: object = draft.source
        if draft.source is not None:
            position = int(draft.source.root.removeprefix("adapter"))
            source = position if position in both_meant | own_copies else draft.source
        steps = [(step.adapter, step.tuner, _own_parts(step, step.adapter in both_meant)) for step in draft.steps]
        return source, [(patch.adapter, patch.rows) for patch in draft.patches], steps

    return identity(one) == identity(other)
