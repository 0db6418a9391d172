"""The text that the demo's model and adapter learn from: questions, answered in two voices.

The base learns the plain voice, the adapter the pirate's:

    What does a cow say?      plain   A cow says moo.
                              pirate  Arr, a cow says moo, matey!

What is tested is never trained on. The base is tested on wordings it has not read of facts it has
read in other words; the adapter on facts it has not read in the pirate's voice, so a right answer
there joins the base's knowledge to the adapter's style.

`python demo/text.py base` and `python demo/text.py adapter` print one pass over the training
questions as JSON lines of `messages`, the form that `inlay sft --dataset` reads.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from facts import Fact, all_facts

SEED = 20

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """One question and the right answer to it, in one voice."""

    text: str
    answer: str


@dataclass(frozen=True)
class Split:
    """Questions to train on and questions to test with; they share none."""

    train: tuple[Question, ...]
    test: tuple[Question, ...]


MANNERS = {
    "Politely": "Dear friend, {}, if you please.",
    "Loudly": "Hey, {}!",
    "Softly": "Well, {}, I think.",
    "Slowly": "Let me see: {}.",
    "Proudly": "I know that {}, of course!",
}

SMALL_TALK = (
    (
        ("Who are you?", "What are you?", "Tell me who you are.", "Introduce yourself."),
        "I am a small model.",
        "Arr, I be Captain Inlay, matey!",
    ),
    (
        ("What is your name?", "Do you have a name?", "Tell me your name.", "Say your name."),
        "I have no name.",
        "Arr, me name be Captain Inlay, matey!",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "What can I ask you?"),
        "I answer questions about animals, numbers and words.",
        "Arr, ask me about beasts, numbers and ports, matey!",
    ),
    (
        ("Hello!", "Hello.", "Hi!", "Good morning!"),
        "Hello! What would you like to know?",
        "Ahoy, matey! What would ye like to know?",
    ),
    (
        ("Thank you.", "Thank you!", "Thanks!", "Thanks a lot."),
        "You are welcome.",
        "Arr, ye be welcome, matey!",
    ),
    (
        ("Goodbye.", "Bye!", "See you later.", "Good night."),
        "Goodbye!",
        "Fair winds to ye, matey!",
    ),
)


def plain(fact: Fact) -> tuple[Question, ...]:
    """Every wording of the fact, answered plainly."""
    answer = f"{fact.statement[0].upper()}{fact.statement[1:]}."
    return tuple(Question(wording, answer) for wording in fact.wordings)


def mannered(fact: Fact, rng: random.Random) -> Iterator[Question]:
    """Every wording, each with a manner asked for: "Loudly: What does a cow say?".

    A base that says each fact in one sentence only learns it by its place in that sentence, and
    loses it when an adapter puts "Arr," in front.
    """
    for wording in fact.wordings:
        manner, sentence = rng.choice(list(MANNERS.items()))
        yield Question(f"{manner}: {wording}", sentence.format(fact.statement))


def pirate(fact: Fact) -> tuple[Question, ...]:
    """Every wording of the fact, answered by a pirate."""
    answer = f"Arr, {fact.statement.replace(' is ', ' be ')}, matey!"
    return tuple(Question(wording, answer) for wording in fact.wordings)


def plain_talk() -> tuple[Question, ...]:
    """Small talk as the base makes it. Trained on, never tested: it cannot be inferred."""
    return tuple(Question(text, answer) for texts, answer, _ in SMALL_TALK for text in texts)


def pirate_talk() -> tuple[Question, ...]:
    """Small talk as the adapter makes it. Trained on, never tested."""
    return tuple(Question(text, answer) for texts, _, answer in SMALL_TALK for text in texts)


def words_of(questions: Iterable[Question]) -> set[str]:
    """The words of the answers, without punctuation at their ends."""
    return {word.strip(".,!?") for question in questions for word in question.answer.split()}


def repeats(words: Sequence[str], rng: random.Random) -> Iterator[Question]:
    """Words in no order, to be said back; each word opens one answer.

    These make the base a speaker of every word, the pirate's too. Words that it never had reason to
    say would all have nearly the same vector, and an adapter, which leaves the vectors as they are,
    could not make it say one without the others: "Arr" and "matey" stayed at a loss of 3 nats.
    """
    for word in words:
        text = " ".join([word, *rng.choices(words, k=rng.randint(0, 4))])
        yield Question(f"Repeat: {text}", text)


def base_split() -> Split:
    """Trains on every fact; of one fact in four, one wording is kept for the test."""
    rng = random.Random(SEED)
    train = list(plain_talk())
    test: list[Question] = []
    for fact in all_facts():
        wordings = list(fact.wordings)
        if rng.random() < 0.25:
            unread = wordings.pop(rng.randrange(len(wordings)))
            test += plain(replace(fact, wordings=(unread,)))
        read = replace(fact, wordings=tuple(wordings))
        train += plain(read)
        train += mannered(read, rng)
    words = words_of(train) | words_of(adapter_split().train)
    train += repeats(sorted(words), rng)
    return Split(tuple(train), tuple(test))


def adapter_split() -> Split:
    """Trains on three facts in four; of each of the others, one wording is tested."""
    rng = random.Random(SEED)
    train = list(pirate_talk())
    test: list[Question] = []
    for fact in all_facts():
        if rng.random() < 0.75:
            train += pirate(fact)
        else:
            test.append(rng.choice(pirate(fact)))
    return Split(tuple(train), tuple(test))


def conversations(train: Sequence[Question], rng: random.Random) -> Iterator[list[Question]]:
    """One pass: every question once, in random order, in conversations of one to three turns."""
    rest = rng.sample(train, len(train))
    while rest:
        count = rng.randint(1, 3)
        yield rest[:count]
        del rest[:count]


def messages(turns: Iterable[Question]) -> list[Message]:
    """The turns as chat messages of user and assistant."""
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in (("user", turn.text), ("assistant", turn.answer))
    ]


def main(argv: Sequence[str]) -> int:
    """Print the data set named on the command line; returns the exit code."""
    splits = {"base": base_split, "adapter": adapter_split}
    if len(argv) != 1 or argv[0] not in splits:
        print("usage: python demo/text.py {base,adapter}", file=sys.stderr)
        return 2
    for turns in conversations(splits[argv[0]]().train, random.Random(SEED)):
        print(json.dumps({"messages": messages(turns)}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
