"""Rows that are odd but honest: greetings, calls of tools as texts, end markers that are no end of text; and packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cases import MODELS, Kit, third_party
from inlay.datasets.row import BadRow, make_row
from inlay.errors import InputError
from inlay.train.examples import UNLABELLED, Encoder, Example
from inlay.train.packing import check_packing
from trainable import add_tokenizer

pytest.importorskip("accelerate")


def encoder(folder: Path, special: str | None = None) -> Encoder:
    """Of the tokenizer of letters; with `special` as its end of text instead of <end>."""
    import transformers

    add_tokenizer(folder)
    if special:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": special}))
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    with third_party():
        return Encoder(transformers.AutoTokenizer.from_pretrained(folder), 64, "delete")


def talk(*turns: tuple[str, str]) -> Any:
    return make_row({"messages": [{"role": role, "content": words} for role, words in turns]}, "here:1")


def test_a_greeting_before_the_first_question_is_read_and_not_learned(tmp_path: Path) -> None:
    made = encoder(tmp_path)
    (example,), counts = made.encode([talk(("assistant", "hi"), ("user", "a"), ("assistant", "b"))])
    learned = [i for i, label in zip(example.ids, example.labels, strict=True) if label != UNLABELLED]
    assert made.tokenizer.decode(learned) == "b<end>" and counts.unlearned_turns == 1
    assert made.tokenizer.decode(example.ids).startswith("<bot>hi<end><user>a<end><bot>b")


# As Qwen3's: what stands before a full stop is a thought, and is dropped once another question follows.
FORGETFUL = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ {'user': '<user>', 'assistant': '<bot>', 'tool': '<system>'}[m['role']] }}"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}{{ m['content'].split('.')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def spelled(made: Encoder, example: Example) -> tuple[str, str]:
    """A text, and the same with _ for what is not learned."""
    labels = [made.tokenizer.decode([i]) if i != UNLABELLED else "_" for i in example.labels]
    return made.tokenizer.decode(example.ids), "".join(labels)


def test_thoughts_that_a_template_drops_later_are_learned_where_they_are_thought(tmp_path: Path) -> None:
    made = encoder(tmp_path)
    made.tokenizer.chat_template = FORGETFUL
    row = talk(("user", "a"), ("assistant", "p.b"), ("tool", "c"), ("assistant", "q.d"), ("user", "e"),
               ("assistant", "r.f"), ("user", "g"), ("assistant", "h"))  # fmt: skip
    examples, counts = made.encode([row])
    assert [spelled(made, example) for example in examples] == [
        # the last answer has no thought, and the last but one had one
        ("<user>a<end><bot>b<end><system>c<end><bot>d<end><user>e<end><bot>f<end><user>g<end><bot>h<end>",
         "_" * 22 + "h<end>"),
        ("<user>a<end><bot>b<end><system>c<end><bot>d<end><user>e<end><bot>r.f<end>", "_" * 16 + "r.f<end>"),
        # between two questions thoughts are kept, so both answers are learned in one text
        ("<user>a<end><bot>p.b<end><system>c<end><bot>q.d<end>", "____p.b<end>____q.d<end>"),
    ]  # fmt: skip
    assert (counts.rows, counts.split, counts.unlearned_turns, counts.too_long) == (3, 2, 0, 0)
    assert counts.learned == 2 + 4 + 8 and counts.longest == 24


@pytest.mark.parametrize("template", [None, FORGETFUL])
@pytest.mark.parametrize("unlearned", [(), (1,), (3, 7)])
def test_each_answer_is_learned_once_after_what_the_model_reads_in_use(
    tmp_path: Path, template: str | None, unlearned: tuple[int, ...]
) -> None:
    """The oracle is the template, asked for each answer in turn."""
    made = encoder(tmp_path)
    made.tokenizer.chat_template = template or made.tokenizer.chat_template
    turns = ["ab", "p.c", "d", "e", "f", "q.g", "h", "i"]
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(turns)
    ]
    row = make_row(
        {"messages": [{**m, **({"loss": False} if i in unlearned else {})} for i, m in enumerate(messages)]}, "here:1"
    )
    examples, _ = made.encode([row])
    found = []
    for example in examples:
        places = [i for i, label in enumerate(example.labels) if label != UNLABELLED]
        starts = [i for i in places if i - 1 not in places]
        found += [(made.tokenizer.decode(example.ids[:i]), turn) for i in starts
                  for turn in [made.tokenizer.decode(example.ids[i:]).split("<end>")[0]]]  # fmt: skip
    expected = [
        (made.tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True), turns[i])
        for i in (1, 3, 5, 7)
        if i not in unlearned
    ]
    assert sorted(found) == sorted(expected)


def test_an_answer_that_begins_otherwise_than_it_is_asked_for_is_counted_and_not_learned(tmp_path: Path) -> None:
    """As of templates that open a thought when they ask, and drop it from answers that are given."""
    made = encoder(tmp_path)
    made.tokenizer.chat_template += "{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(InputError, match="1 have no answer that the chat template shows as it asks for it"):
        made.encode([talk(("user", "a"), ("assistant", "b"))])
    (example,), counts = made.encode([talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "?d"))])
    assert spelled(made, example)[1] == "_" * 11 + "d<end>" and counts.unlearned_turns == 1


def test_an_end_marker_that_is_not_the_end_of_text_is_the_only_end(tmp_path: Path) -> None:
    """As of templates for talk on a base whose end of text is another token: <end> is special, though no eos."""
    made = encoder(tmp_path, special="<pad>")
    (example,), _ = made.encode([talk(("user", "a"), ("assistant", "b"))])
    assert made.tokenizer.decode(example.ids) == "<user>a<end><bot>b<end>"


def test_rows_without_anything_to_learn_are_counted(tmp_path: Path) -> None:
    made = encoder(tmp_path)
    made.max_length, made.truncation = 4, "right"
    good = talk(("user", ""), ("assistant", "b"))
    examples, counts = made.encode([talk(("user", "abcd"), ("assistant", "b")), good])
    assert len(examples) == 1 and (counts.rows, counts.unanswered, counts.cut) == (1, 1, 2)
    with pytest.raises(InputError, match=r"none of the 1 held-out rows can be learned: 0 are longer .*, 1 have no"):
        made.encode([talk(("user", "abcd"), ("assistant", "b"))], "held-out rows")


def test_tools_and_arguments_that_are_json_in_texts_are_objects() -> None:
    """A template would write them as texts in quotes."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "w"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"}, {"role": "assistant", "content": "five"},
    ]  # fmt: skip
    row = make_row({"messages": messages, "tools": ['{"type": "function"}']}, "here:1")
    assert row.tools == ({"type": "function"},)
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert call["function"]["arguments"] == '{"x": 1}', "the record itself stays"
    broken = {"type": "function", "function": {"name": "f", "arguments": "{x"}}
    with pytest.raises(BadRow, match="arguments of a call is not JSON"):
        make_row({"messages": [messages[0], {**messages[1], "tool_calls": [broken]}]}, "here:1")
    with pytest.raises(BadRow, match="tool_calls must be a list"):
        make_row({"messages": [messages[0], {**messages[1], "tool_calls": broken}]}, "here:1")


@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_a_model_that_is_deaf_to_positions_cannot_be_packed_however_weakly_it_attends(
    kit: Kit, strength: float
) -> None:
    import torch

    net = MODELS["qwen2"].load(kit.base("qwen2"))
    net.config.use_cache = False
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "self_attn.o_proj" in name:
                p.mul_(strength)
    block = [Example((7, 8, 9), (7, 8, 9)), Example((11, 12, 13), (11, 12, 13))]
    check_packing(net, [block])

    class Deaf:
        """The same model; `position_ids` is an argument that it drops, or does not know."""

        device = net.device

        def __init__(self, knows: bool) -> None:
            self.knows = knows

        def eval(self) -> None: ...

        def __call__(self, input_ids: Any, **more: Any) -> Any:
            if more and not self.knows:
                raise TypeError("got an unexpected keyword argument 'position_ids'")
            return net(input_ids=input_ids)

    for knows in (True, False):
        with third_party(), pytest.raises(InputError, match="see each other"):
            check_packing(Deaf(knows), [block])
