"""Prompts: messages through the model's chat template, or plain text; and a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from inlay.errors import InputError
from inlay.infer.backend import Backend, Reply, Request, Sampling

Message = dict[str, Any]  # role, content

HELP = "exit: end · clear: forget what was said · multi-line / single-line · Ctrl-C: stop a reply"
EXIT, CLEAR, MULTI, SINGLE = ("exit", "quit"), "clear", "multi-line", "single-line"
END_OF_LINES = "#"  # alone on a line it ends what is written over several


class NoTemplate(InputError):
    """A model that knows no conversations."""


def template_tokens(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> tuple[int, ...]:
    """The tokens of a conversation, up to where the assistant's answer begins.

    Raises NoTemplate for a model without a chat template, InputError for messages that its template refuses.
    """
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise NoTemplate(
            "the model has no chat template; put its chat_template.jinja into the directory of the base or of the "
            "adapter, or pass --use_chat_template false to have the plain text continued"
        )
    kept = [{k: v for k, v in m.items() if k != "loss"} for m in messages]
    more = {"tools": list(tools)} if tools else {}
    try:
        text = tokenizer.apply_chat_template(kept, tokenize=False, add_generation_prompt=True, **more)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise InputError(f"the chat template of the model cannot be used with these messages: {error}") from error
    return tuple(_encoded(tokenizer, text, special=False))


def _encoded(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Raises InputError for half a character, as bytes that are not UTF-8 and cut `\\ud83d` escapes leave behind."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not whole: {text[error.start]!r} at {error.start} is no character") from None
    found: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return found


def text_tokens(tokenizer: Any, text: str, *, closed: bool = False) -> tuple[int, ...]:
    """The tokens of plain text, with the special ones that the tokenizer puts around it.

    What ends a text is left out, as the text is to go on, unless it is `closed`: to be embedded or classified.
    """
    tokens = _encoded(tokenizer, text, special=True)
    while not closed and tokens[1:] and tokens[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        tokens.pop()
    return tuple(tokens)


def prompt_tokens(
    tokenizer: Any, prompt: str | Sequence[Message], system: str | None, use_template: bool, *,
    tools: Sequence[Any] = (), closed: bool = False,
) -> tuple[int, ...]:  # fmt: skip
    """The tokens of a prompt: a text, or messages. `system` comes first where the messages bring none of their own.

    Without the template the contents of the messages are put on lines, one after another; `tools` need one.
    """
    if not use_template:
        if system is not None:
            raise InputError("--system belongs to a chat template; leave it out with --use_chat_template false")
        if tools:
            raise InputError("tools belong to a chat template, which --use_chat_template false leaves out")
        text = prompt if isinstance(prompt, str) else "\n".join(str(m["content"]) for m in prompt)
        return text_tokens(tokenizer, text, closed=closed)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None and not (messages and messages[0]["role"] == "system"):
        messages = [{"role": "system", "content": system}, *messages]
    return template_tokens(tokenizer, messages, tools)


class Terminal(Protocol):
    """Where a conversation takes place. `read` raises EOFError at the end of input."""

    def read(self, prompt: str) -> str: ...

    def say(self, text: str, end: str = "\n") -> None: ...


class Conversation:
    """Questions from a terminal, and answers with all that was said before.

    With `stream` a reply is printed as it comes; beams, which decide on the text at its end, are printed then.
    """

    def __init__(
        self, backend: Backend, sampling: Sampling, terminal: Terminal, *, system: str | None = None,
        use_template: bool = True, stream: bool = True,
    ) -> None:  # fmt: skip
        self.backend, self.sampling, self.terminal = backend, sampling, terminal
        self.system, self.use_template, self.stream = system, use_template, stream and sampling.num_beams == 1
        self.messages: list[Message] = []
        self.multi_line = False

    def run(self) -> None:
        """Until `exit` or the end of input."""
        if self.use_template:  # a missing template is told before the first question
            prompt_tokens(self.backend.tokenizer, "", self.system, True)
        self.terminal.say(HELP)
        while True:
            try:
                question = self._read()
            except EOFError:
                self.terminal.say("")
                return
            except KeyboardInterrupt:
                self.terminal.say("\n(exit ends)")
                continue
            if question.strip().lower() in EXIT:
                return
            if not self._command(question.strip().lower()) and question.strip():
                self._answer(question)

    def _read(self) -> str:
        if not self.multi_line:
            return self.terminal.read("> ")
        lines = [self.terminal.read(f"[end with {END_OF_LINES}] > ")]
        while lines[-1].rstrip() != END_OF_LINES and not self._is_command(lines):
            try:
                lines.append(self.terminal.read(""))
            except EOFError:  # what stands there is asked; the next question finds the end again
                break
        return "\n".join(lines[:-1] if lines[-1].rstrip() == END_OF_LINES else lines)

    @staticmethod
    def _is_command(lines: Sequence[str]) -> bool:
        return len(lines) == 1 and lines[0].strip().lower() in (*EXIT, CLEAR, SINGLE, MULTI)

    def _command(self, word: str) -> bool:
        if word == CLEAR:
            self.messages.clear()
            self.terminal.say("(forgotten)")
        elif word in (MULTI, SINGLE):
            self.multi_line = word == MULTI
        else:
            return False
        return True

    def _answer(self, question: str) -> None:
        self.messages.append({"role": "user", "content": question})
        said: list[str] = []
        try:
            asked = self.messages if self.use_template else question
            request = Request(
                prompt_tokens(self.backend.tokenizer, asked, self.system, self.use_template), self.sampling
            )
            for piece in pieces(self.backend, request, self.stream):
                said.append(piece)
                self.terminal.say(piece, end="")
        except KeyboardInterrupt:
            self.terminal.say(" (stopped)", end="")
        except InputError as error:
            self.messages.pop()
            self.terminal.say(f"{error}\n(clear forgets what was said before)")
            return
        self.terminal.say("")
        self.messages.append({"role": "assistant", "content": "".join(said)})


def pieces(
    backend: Backend, request: Request, stream: bool, done: Callable[[Reply], None] | None = None
) -> Iterator[str]:
    """The text of a reply as it comes, or all at once; `done` gets the reply itself."""
    if not stream:
        reply = backend.generate([request])[0]
        yield reply.text
        if done:
            done(reply)
        return
    stream_of = backend.stream(request)
    try:
        for piece in stream_of:
            if isinstance(piece, str):
                yield piece
            elif done:
                done(piece)
    finally:
        getattr(stream_of, "close", lambda: None)()
