"""Inference on PyTorch: what is loaded is what an export would have written, and what comes out is what was asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from cases import MODELS, Kit, edit_json, load_peft, new_peft_model, randomise, save_adapter, third_party
from chatty import GREEDY, add_tokenizer, ask, logits, source_of, talking
from inlay.cli.inference import engine_words
from inlay.cli.main import main
from inlay.datasets.row import make_row
from inlay.errors import InputError
from inlay.infer import batch
from inlay.infer.backend import Reply, Request, Sampling, open_backend
from inlay.infer.chat import Conversation, prompt_tokens
from inlay.infer.detokenise import Detokeniser
from inlay.infer.growing import stop_criterion
from inlay.infer.loading import load_model
from inlay.infer.pt import TorchBackend
from test_experts import legacy


@pytest.fixture
def base(kit: Kit, tmp_path: Path) -> Path:
    return talking(kit, tmp_path)


@pytest.fixture
def live(base: Path, plain_lora: Path) -> Iterator[TorchBackend]:
    backend = TorchBackend(source_of(base, [plain_lora]))
    yield backend
    backend.close()


# --- merged while loading ---------------------------------------------------------------------------

LOADED = {
    "qwen2-plain": "F32", "qwen2-dora": "BF16", "qwen2-everything": "BF16", "qwen2-embedding": "F16",
    "gpt2-plain": "F32", "gpt2-embeddings": "BF16",
}  # fmt: skip


def same_weights(one: Any, other: Any) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
    assert {n: p.data_ptr() for n, p in one.named_parameters()}.keys() == dict(other.named_parameters()).keys()


@pytest.mark.parametrize("name", LOADED)
def test_a_plan_loads_as_what_it_would_have_written(kit: Kit, name: str) -> None:
    dtype = LOADED[name]
    merged = kit.merged(name, dtype)
    base = kit.base(name.partition("-")[0], dtype)
    model, _ = load_model(inlay.make_plan(base, [kit.adapter(name)]))
    with third_party():
        expected = type(model).from_pretrained(merged)
    same_weights(model, expected)
    for (_, one), (_, other) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["qwen3moe", "mixtral", "qwen2-tied", "neox"])
def test_stacks_ties_and_renamed_tensors_load_as_written(kit: Kit, tmp_path: Path, family: str) -> None:
    base = kit.base(family, "BF16")
    targets = ["query_key_value", "dense"] if family == "neox" else ["q_proj", "o_proj", "embed_tokens"]
    adapter = save_adapter(
        new_peft_model(MODELS[family].load(base), {"r": 3, "target_modules": targets}, 1), tmp_path / "a"
    )
    plan = inlay.make_plan(base, [adapter])
    inlay.run_plan(plan, tmp_path / "out")
    model, _ = load_model(plan)
    with third_party():
        expected = type(model).from_pretrained(tmp_path / "out")
    same_weights(model, expected)
    assert model.config.tie_word_embeddings == expected.config.tie_word_embeddings


def test_torch_dtype_rounds_once(kit: Kit, tmp_path: Path) -> None:
    plan = inlay.make_plan(kit.base("qwen2"), [kit.adapter("qwen2-plain")], torch_dtype="bfloat16")
    inlay.run_plan(plan, tmp_path / "out")
    model, _ = load_model(plan)
    with third_party():
        same_weights(model, type(model).from_pretrained(tmp_path / "out"))
    assert model.dtype == torch.bfloat16


def test_nothing_is_written_while_loading(base: Path, plain_lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    real = os.open

    def spy(path: Any, flags: int, *more: Any, **kw: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(path)
        return real(path, flags, *more, **kw)

    before = sorted(p for p in base.parent.rglob("*"))
    monkeypatch.setattr(os, "open", spy)
    TorchBackend(source_of(base, [plain_lora], merge=True))
    assert not written
    assert sorted(p for p in base.parent.rglob("*")) == before


def test_a_quantised_base_is_decoded(tmp_path: Path) -> None:
    """Against the decoding that `run_plan` writes, which its own tests compare with the libraries."""
    stored = Path(__file__).parents[2] / "shared/data/quantised/gptq-int4"
    if not stored.is_dir():
        stored = Path(__file__).parents[1] / "shared/data/quantised/gptq-int4"
    if not stored.is_dir():
        pytest.skip("no quantised model here")
    plan = inlay.make_plan(stored, [], torch_dtype="float32")
    inlay.run_plan(plan, tmp_path / "out")
    model, _ = load_model(plan)
    with third_party():
        same_weights(model, type(model).from_pretrained(tmp_path / "out"))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(kit: Kit, tmp_path: Path) -> None:
    base = kit.copy_of(kit.base("llama"), tmp_path)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("model.norm.weight")
    tensors = load_file(base / file)
    tensors.pop("model.norm.weight")
    save_file(tensors, base / file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"has no tensor for model.norm.weight"):
        load_model(inlay.make_plan(base, []))


# --- adapters that stay apart -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [["qwen2-plain"], ["qwen2-plain", "qwen2-rslora"], ["qwen2-dora-rslora-with-patterns"]]
)
def test_live_adapters_compute_the_sum_each_with_its_scaling(kit: Kit, base: Path, names: list[str]) -> None:
    adapters = [kit.adapter(n) for n in names]
    backend = TorchBackend(source_of(base, adapters))
    assert backend.peft is not None and not backend.notes
    plan = inlay.make_plan(kit.base("qwen2"), adapters)
    merged, _ = load_model(plan)
    effect = (logits(merged) - logits(load_model(inlay.make_plan(base, []))[0])).abs().max()
    difference = (logits(backend.model) - logits(merged)).abs().max()
    assert effect > 1 and difference < 1e-4 * effect


def test_weights_of_adapters_scale_them(kit: Kit, base: Path) -> None:
    adapters = [kit.adapter("qwen2-plain"), kit.adapter("qwen2-rslora")]
    backend = TorchBackend(source_of(base, adapters, weights=(0.5, -1.0)))
    merged, _ = load_model(inlay.make_plan(base, adapters, weights=[0.5, -1.0]))
    torch.testing.assert_close(logits(backend.model), logits(merged), rtol=1e-4, atol=1e-4)


def test_what_peft_drops_is_merged_instead_and_said(kit: Kit, tmp_path: Path) -> None:
    """A LoRA on single experts, as transformers 4 named them; PEFT 0.21 scales it by √2 under rsLoRA."""
    base = talking(kit, tmp_path, "qwen3moe")
    pairs = legacy(tmp_path / "a", {"model.layers.0.mlp.experts.0.gate_proj": (12, 16)}, rslora=True)
    assert pairs
    backend = TorchBackend(source_of(base, [tmp_path / "a"]))
    assert backend.peft is None
    assert any("merged while loading" in note and "another transformers" in note for note in backend.notes)
    merged, _ = load_model(inlay.make_plan(base, [tmp_path / "a"]))
    same_weights(backend.model, merged)


def test_several_adapters_with_full_copies_are_merged_instead(kit: Kit, base: Path) -> None:
    backend = TorchBackend(source_of(base, [kit.adapter("qwen2-plain"), kit.adapter("qwen2-saved-head")]))
    assert backend.peft is None and any("more than pairs" in note for note in backend.notes)


def test_an_adapter_for_another_base_is_refused_before_loading(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, "gpt2")
    with pytest.raises(InputError, match="cannot merge"):
        TorchBackend(source_of(base, [kit.adapter("qwen2-plain")]))


def test_a_tokenizer_that_the_adapter_brings_is_used(kit: Kit, base: Path, tmp_path: Path) -> None:
    adapter = kit.copy_of(kit.adapter("qwen2-plain"), tmp_path / "x")
    (adapter / "chat_template.jinja").write_text("{{ 'own' }}")
    backend = TorchBackend(source_of(base, [adapter], merge=True))
    tokens = prompt_tokens(backend.tokenizer, "hello", None, True)
    assert backend.tokenizer.decode(tokens) == "own"


# --- replies ----------------------------------------------------------------------------------------


def greedy_by_hand(model: Any, tokens: list[int], count: int) -> list[int]:
    found: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model(input_ids=torch.tensor([tokens + found])).logits[0, -1].argmax()))
    return found


def test_greedy_replies_are_those_of_peft(kit: Kit, base: Path, plain_lora: Path, live: TorchBackend) -> None:
    adapted = load_peft(MODELS["qwen2"].load(base), plain_lora)
    requests = [ask(live, text) for text in ("hello", "a", "what is it?")]
    replies = live.generate(requests)
    for request, reply in zip(requests, replies, strict=True):
        tokens = greedy_by_hand(adapted, list(request.tokens), 10)
        if 1 not in tokens:
            assert reply == Reply(
                live.tokenizer.decode(tokens, skip_special_tokens=True), len(request.tokens), 10, "length"
            )
        assert live.generate([request]) == [reply]


def test_streamed_pieces_join_to_the_reply(live: TorchBackend) -> None:
    for text in ("hello", "abc", "what?"):
        *pieces, reply = live.stream(ask(live, text))
        assert isinstance(reply, Reply) and "".join(map(str, pieces)) == reply.text
        assert live.generate([ask(live, text)]) == [reply]


def test_an_end_token_ends_a_reply_and_is_no_part_of_it(live: TorchBackend) -> None:
    request = ask(live, "hello")
    tokens = greedy_by_hand(live.model, list(request.tokens), 10)
    live.model.generation_config.eos_token_id = tokens[3]
    at = tokens.index(tokens[3])
    reply = live.generate([request])[0]
    assert reply.finish_reason == "stop" and reply.completion_tokens == at + 1
    *_, streamed = live.stream(request)
    assert streamed == reply


def test_a_stop_word_ends_a_reply_and_is_no_part_of_it(live: TorchBackend) -> None:
    request = ask(live, "hello")
    whole = live.generate([request])[0].text
    word = whole[2:4]
    assert len(word) == 2
    stopping = Request(request.tokens, Sampling(max_new_tokens=10, temperature=0, stop_words=(word, "zzz")))
    expected = whole[: whole.index(word)]
    reply = live.generate([stopping])[0]
    assert (reply.text, reply.finish_reason) == (expected, "stop") and reply.completion_tokens < 10
    *pieces, streamed = live.stream(stopping)
    assert "".join(map(str, pieces)) == expected == streamed.text and streamed.finish_reason == "stop"


def test_a_seed_repeats_what_was_drawn_and_another_draws_anew(live: TorchBackend) -> None:
    def drawn(seed: int) -> str:
        return live.generate([ask(live, "hello", Sampling(max_new_tokens=16, temperature=3.0, seed=seed))])[0].text

    assert drawn(1) == drawn(1) != drawn(2)


def test_all_tokens_are_drawn_from_unless_it_is_said_otherwise(live: TorchBackend) -> None:
    """transformers draws from 50 where nothing is said; the endpoint's clients and vLLM take it for all."""

    def top_k(asked: int | None) -> int:
        return int(live._settings(Sampling(temperature=1.0, top_k=asked), 5, 0).top_k)

    assert (top_k(None), top_k(-1), top_k(7)) == (0, 0, 7)
    live.model.generation_config.top_k = 20
    assert (top_k(None), top_k(0), top_k(7)) == (20, 0, 7)


def test_top_k_of_one_is_greedy(live: TorchBackend) -> None:
    one = Sampling(max_new_tokens=10, temperature=5.0, top_k=1, seed=3)
    assert live.generate([ask(live, "hello", one)])[0].text == live.generate([ask(live, "hello")])[0].text


def test_closing_a_stream_ends_the_work(live: TorchBackend) -> None:
    import threading

    stream = live.stream(ask(live, "hello", Sampling(max_new_tokens=25, temperature=0)))
    next(stream)
    stream.close()
    assert not any(t.name == "generate" for t in threading.enumerate())


def test_an_interrupt_while_the_work_begins_ends_it(live: TorchBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    before = [t for t in threading.enumerate() if t.name == "generate"]
    with monkeypatch.context() as patch:
        patch.setattr("inlay.infer.pt.threading.Thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(live.stream(ask(live, "hello", Sampling(max_new_tokens=25, temperature=0))))
    assert not before and not any(t.name == "generate" for t in threading.enumerate())


@pytest.mark.parametrize(("length", "asked", "room"), [(31, 1, 1), (32, None, 0), (30, 3, 0), (22, None, 10)])
def test_a_prompt_must_fit_into_the_context(live: TorchBackend, length: int, asked: int | None, room: int) -> None:
    request = Request((5,) * length, Sampling(max_new_tokens=asked, temperature=0))
    if not room:
        with pytest.raises(InputError, match="context is 32"):
            live.generate([request])
        return
    reply = live.generate([request])[0]
    assert reply.completion_tokens <= room


def test_prompts_of_all_lengths_run_in_one_batch(live: TorchBackend) -> None:
    """The longest leaves less room than the others; each gets what it would get alone."""
    requests = [Request((5,) * n, Sampling(temperature=0)) for n in (30, 4, 9)]
    assert live.generate(requests) == [live.generate([r])[0] for r in requests]


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}, {"num_beams": 0}, {"stop_words": ("",)}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_beams_find_a_likelier_reply_and_are_not_streamed(live: TorchBackend) -> None:
    beams = ask(live, "hello", Sampling(max_new_tokens=6, temperature=0, num_beams=4))

    def likelihood(text: str) -> float:
        tokens = [*beams.tokens, *live.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            scores = live.model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        return sum(float(scores[i - 1, tokens[i]]) for i in range(len(beams.tokens), len(tokens)))

    one, four = (
        live.generate([r])[0].text for r in (ask(live, "hello", Sampling(max_new_tokens=6, temperature=0)), beams)
    )
    if len(one) == len(four) == 6:
        assert likelihood(four) >= likelihood(one)
    with pytest.raises(InputError, match="num_beams"):
        next(live.stream(beams))


def bytes_tokenizer() -> Any:
    """One token a byte, so that most characters outside ASCII take several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["grüße, 北京 🦊!", "x", " a b ", "é"])
@pytest.mark.parametrize("stop", [(), ("北x", "🦊!!"), ("京 ",)])
def test_no_piece_holds_half_a_character_or_a_part_of_a_stop_word(text: str, stop: tuple[str, ...]) -> None:
    tokenizer = bytes_tokenizer()
    detokeniser = Detokeniser(tokenizer, tokenizer("what?")["input_ids"], stop)
    pieces = [detokeniser.add([t]) for t in tokenizer(text)["input_ids"]] + [detokeniser.finish()]
    expected = text[: min([text.find(w) for w in stop if w in text], default=len(text))]
    assert "".join(pieces) == expected
    assert not any("�" in piece for piece in pieces)
    assert detokeniser.stopped == (expected != text)


# --- what two ways to the same reply must agree on ---------------------------------------------------


def test_a_stop_word_ends_the_count_in_a_batch_too(live: TorchBackend) -> None:
    """Rows that are done are padded until the last one is; the padding is no part of a reply."""
    whole = live.generate([ask(live, "hello")])[0].text
    stopping = Sampling(max_new_tokens=10, temperature=0, stop_words=(whole[1:3],))
    requests = [ask(live, text, stopping) for text in ("hello", "a", "what is it?")]
    alone = [live.generate([r])[0] for r in requests]
    assert live.generate(requests) == alone == [list(live.stream(r))[-1] for r in requests]
    tokens = greedy_by_hand(live.model, list(requests[0].tokens), 10)
    texts = [live.tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(11)]
    assert alone[0].completion_tokens == next(n for n, text in enumerate(texts) if whole[1:3] in text)
    assert max(r.completion_tokens for r in alone) > alone[0].completion_tokens


def test_a_penalty_on_repetition_is_none_on_padding(live: TorchBackend) -> None:
    """Where the padding is the end token a penalty on it would keep a reply from ending."""
    live.tokenizer.pad_token = live.tokenizer.eos_token
    penalised = Sampling(max_new_tokens=10, temperature=0, repetition_penalty=9.0)
    requests = [ask(live, text, penalised) for text in ("what is it? what is it?", "a", "b")]
    first = greedy_by_hand(live.model, list(requests[1].tokens), 1)[0]
    live.model.generation_config.eos_token_id = first  # the likeliest token ends the second reply at once
    live.tokenizer.pad_token_id = first
    alone = [live.generate([r])[0] for r in requests]
    assert alone[1].completion_tokens == 1 and live.generate(requests) == alone


def test_the_text_is_without_an_end_token_that_has_one(live: TorchBackend) -> None:
    request = ask(live, "hello")
    whole = live.generate([request])[0].text
    live.model.generation_config.eos_token_id = live.tokenizer.convert_tokens_to_ids(whole[3])
    expected = whole[: whole.index(whole[3])]
    assert live.generate([request])[0].text == expected
    *pieces, reply = live.stream(request)
    assert isinstance(reply, Reply) and "".join(map(str, pieces)) == expected == reply.text


def sentencepiece_tokenizer() -> Any:
    """Words with a mark for the space before them, which decoding leaves out at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁one", "▁two", "▁three"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_stop_word_with_a_space_is_found_in_the_first_token() -> None:
    tokenizer = sentencepiece_tokenizer()
    assert tokenizer.decode([2]) == "two"
    check = stop_criterion(tokenizer, (" two",), 1, ())
    assert check(torch.tensor([[1, 2], [1, 3]]), None).tolist() == [True, False]


@pytest.mark.parametrize(
    "setting", [{"return_dict_in_generate": True}, {"num_return_sequences": 2}, {"output_scores": True}]
)
def test_a_generation_config_with_other_outputs_gives_the_same_reply(
    live: TorchBackend, setting: dict[str, Any]
) -> None:
    request = ask(live, "hello")
    expected = live.generate([request])
    for name, value in setting.items():
        setattr(live.model.generation_config, name, value)
    assert live.generate([request]) == expected == [list(live.stream(request))[-1]]


def test_stop_strings_of_the_generation_config_end_a_reply(live: TorchBackend) -> None:
    request = ask(live, "hello")
    whole = live.generate([request])[0].text
    live.model.generation_config.stop_strings = [whole[2:4]]
    reply = live.generate([request])[0]
    assert (reply.text, reply.finish_reason) == (whole[: whole.index(whole[2:4])], "stop")


def test_what_transformers_refuses_to_generate_is_an_input_error(live: TorchBackend) -> None:
    live.model.generation_config.penalty_alpha = 0.5  # contrastive search, which asks for code from the Hub
    with pytest.raises(InputError, match="cannot generate with these settings"):
        live.generate([ask(live, "hello", Sampling(temperature=0, top_k=4))])


def test_logits_that_are_nan_are_told(live: TorchBackend) -> None:
    live.model.lm_head.weight.data = torch.full_like(live.model.lm_head.weight, float("nan"))
    drawn = ask(live, "hello", Sampling(temperature=1.0, max_new_tokens=2))
    with pytest.raises(InputError, match="Inf or NaN"):
        live.generate([drawn])
    with pytest.raises(InputError, match="Inf or NaN"):
        list(live.stream(drawn))


# --- chat -------------------------------------------------------------------------------------------


class Script:
    """A terminal with a prepared input; a KeyboardInterrupt in it is raised where it is read."""

    def __init__(self, *lines: Any) -> None:
        self.lines = list(lines)
        self.said = ""

    def read(self, prompt: str) -> str:
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def say(self, text: str, end: str = "\n") -> None:
        self.said += text + end


class Echo:
    """A backend that says the prompt back, and can be interrupted in the middle."""

    name, context, notes = "echo", None, ()

    def __init__(self, tokenizer: Any, interrupt: bool = False) -> None:
        self.tokenizer, self.interrupt = tokenizer, interrupt
        self.asked: list[str] = []
        self.closed = 0

    def stream(self, request: Request) -> Iterator[str | Reply]:
        self.asked.append(self.tokenizer.decode(request.tokens))
        try:
            yield "yes"
            if self.interrupt:
                raise KeyboardInterrupt
            yield ", indeed"
            yield Reply("yes, indeed", len(request.tokens), 2, "stop")
        finally:
            self.closed += 1


@pytest.fixture
def tokenizer(base: Path) -> Any:
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer makes it one of Qwen2's, which has no spaces

    return PreTrainedTokenizerFast.from_pretrained(base)


def talk(backend: Any, *lines: Any, **more: Any) -> str:
    script = Script(*lines)
    Conversation(backend, GREEDY, script, **more).run()
    return script.said


def test_a_conversation_remembers_until_it_is_cleared(tokenizer: Any) -> None:
    echo = Echo(tokenizer)
    said = talk(echo, "one", "two", "clear", "three", "exit", "never", system="be kind")
    assert echo.asked == [
        "[s]be kind\n[u]one\n[a]",
        "[s]be kind\n[u]one\n[a]yes, indeed\n[u]two\n[a]",
        "[s]be kind\n[u]three\n[a]",
    ]
    assert said.count("yes, indeed\n") == 3 and echo.closed == 3


def test_several_lines_make_one_question(tokenizer: Any) -> None:
    echo = Echo(tokenizer)
    talk(echo, "multi-line", "one", "two", "#", "single-line", "three")
    assert echo.asked[0] == "[u]one\ntwo\n[a]" and echo.asked[1].endswith("[u]three\n[a]")


def test_the_end_of_input_ends_several_lines_too(tokenizer: Any) -> None:
    echo = Echo(tokenizer)
    talk(echo, "multi-line", "one", "two")
    assert echo.asked == ["[u]one\ntwo\n[a]"]


def test_beams_can_be_talked_to(live: TorchBackend) -> None:
    beams = Sampling(max_new_tokens=6, temperature=0, num_beams=2)
    script = Script("hello")
    Conversation(live, beams, script).run()
    expected = live.generate([Request(prompt_tokens(live.tokenizer, "hello", None, True), beams)])[0].text
    assert script.said.endswith(f"{expected}\n\n") and expected


def test_half_a_character_is_told_and_the_conversation_goes_on(live: TorchBackend) -> None:
    said = talk(live, "a\udcffb", "b")
    assert r"'\udcff'" in said and said.count("clear forgets") == 1
    with pytest.raises(InputError, match="no character"):
        prompt_tokens(live.tokenizer, "\ud83d", None, False)


def test_an_interrupt_stops_the_reply_and_not_the_program(tokenizer: Any) -> None:
    echo = Echo(tokenizer, interrupt=True)
    said = talk(echo, "one", KeyboardInterrupt(), "two")
    assert echo.asked[1] == "[u]one\n[a]yes\n[u]two\n[a]" and said.count("(stopped)") == 2
    assert echo.closed == 2


def test_a_question_that_does_not_fit_is_told_and_forgotten(live: TorchBackend) -> None:
    said = talk(live, "a" * 40, "b")
    assert "context is 32" in said and said.count("clear forgets") == 1


def test_without_a_chat_template_a_conversation_is_refused(kit: Kit, tmp_path: Path) -> None:
    backend = TorchBackend(source_of(talking(kit, tmp_path, template=None)))
    with pytest.raises(InputError, match="--use_chat_template false"):
        talk(backend, "hello")
    assert talk(backend, "hello", use_template=False)


def test_a_template_that_refuses_is_an_input_error(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, template="{{ raise_exception('no system please') }}")
    backend = TorchBackend(source_of(base))
    with pytest.raises(InputError, match="no system please"):
        prompt_tokens(backend.tokenizer, "hello", None, True)


# --- datasets ---------------------------------------------------------------------------------------

ROWS = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "uno"}]},
    {"query": "two", "response": "due"},
    {"prompt": "three"},
    {"messages": [{"role": "user", "content": "four"}]},
]


def dataset(path: Path, rows: Any = ROWS) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def infer(*words: object) -> int:
    return main(["infer", *map(str, words), "--quiet"])


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_dataset_is_answered_row_by_row(base: Path, plain_lora: Path, live: TorchBackend, tmp_path: Path) -> None:
    data, out = dataset(tmp_path / "d.jsonl"), tmp_path / "r.jsonl"
    options = ("--model", base, "--adapters", plain_lora, "--val_dataset", data, "--result_path", out)
    assert infer(*options, "--max_new_tokens", 5, "--temperature", 0, "--max_batch_size", 3) == 0
    found = results(out)
    assert [r["line"] for r in found] == [f"{data}:{i}" for i in (1, 2, 3, 4)]
    assert [r["labels"] for r in found] == ["uno", "due", None, None]
    for row, asked in zip(found, ("one", "two", "three", "four"), strict=True):
        request = Request(prompt_tokens(live.tokenizer, asked, None, True), Sampling(max_new_tokens=5, temperature=0))
        assert row["response"] == live.generate([request])[0].text == row["messages"][-1]["content"]


def test_a_rerun_goes_on_where_it_stopped(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = dataset(tmp_path / "d.jsonl"), tmp_path / "r.jsonl"
    options = ("--model", base, "--val_dataset", data, "--result_path", out, "--max_new_tokens", 4, "--json")
    assert infer(*options) == 0
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:2]) + lines[2][:9])  # killed while it wrote the third
    capsys.readouterr()
    assert infer(*options) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 2
    assert out.read_bytes() == whole
    assert infer(*options) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 0 and out.read_bytes() == whole


def test_results_of_another_request_are_not_mixed_in(
    base: Path, plain_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = dataset(tmp_path / "d.jsonl"), tmp_path / "r.jsonl"
    options = ("--model", base, "--val_dataset", data, "--result_path", out)
    assert infer(*options, "--max_new_tokens", 4) == 0
    whole = out.read_bytes()
    for other in (("--max_new_tokens", 5), ("--max_new_tokens", 4, "--adapters", plain_lora)):
        assert infer(*options, *other) == 2
        assert "another request" in capsys.readouterr().err and out.read_bytes() == whole
    out.write_text("my notes")
    assert infer(*options, "--max_new_tokens", 4) == 2
    assert out.read_text() == "my notes"


def test_a_bad_row_is_named_and_left_out_or_stops(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "a" * 40}
    data, out = dataset(tmp_path / "d.jsonl", [ROWS[0], "{broken", {"what": 1}, long, ROWS[1]]), tmp_path / "r.jsonl"
    options = ("--model", base, "--val_dataset", data, "--result_path", out, "--max_new_tokens", 2)
    assert infer(*options) == 0
    said = capsys.readouterr().err
    assert all(f"{data}:{i}" in said for i in (2, 3, 4)) and "context is 32" in said
    assert [r["line"] for r in results(out)] == [f"{data}:1", f"{data}:5"]
    out.unlink()
    assert infer(*options, "--strict", "true") == 2
    assert f"{data}:2" in capsys.readouterr().err and not out.exists()


def test_a_byte_that_is_no_text_spoils_its_own_row(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "d.jsonl", tmp_path / "r.jsonl"
    data.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n{"prompt": "b"}\n')
    options = ("--model", base, "--val_dataset", data, "--result_path", out, "--max_new_tokens", 2)
    assert infer(*options, "--strict", "true") == 2 and not out.exists()
    assert f"{data}:2  is not UTF-8 text" in capsys.readouterr().err
    assert infer(*options) == 0
    assert f"{data}:2  is not UTF-8 text" in capsys.readouterr().err
    assert [r["line"] for r in results(out)] == [f"{data}:1", f"{data}:3"]


def test_tools_of_a_row_reach_the_template(kit: Kit, tmp_path: Path) -> None:
    template = "{% for t in tools or [] %}{{ t.name }}:{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    backend = TorchBackend(source_of(talking(kit, tmp_path, template=template)))
    row = make_row({"messages": [{"role": "user", "content": "go"}], "tools": [{"name": "abc"}]}, "d:1")
    (asked,) = batch.make_requests(backend, [row], GREEDY, identity="")
    assert asked.request.tokens == tuple(backend.tokenizer("abc:go", add_special_tokens=False)["input_ids"])
    with pytest.raises(InputError, match="d:1  tools belong to a chat template"):
        batch.make_requests(backend, [row], GREEDY, identity="", use_template=False)


def test_rows_with_halves_of_characters_are_left_out_and_labels_are_kept(base: Path, tmp_path: Path) -> None:
    data = dataset(tmp_path / "d.jsonl", [{"prompt": "a\ud83d"}, {"prompt": "b", "completion": "\ud83d"}])
    out = tmp_path / "r.jsonl"
    for _ in range(2):
        assert infer("--model", base, "--val_dataset", data, "--result_path", out, "--max_new_tokens", 2) == 0
        (found,) = results(out)
        assert found["line"] == f"{data}:2" and found["labels"] == "\ud83d"


def test_another_base_at_the_same_place_is_another_request(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = dataset(tmp_path / "d.jsonl"), tmp_path / "r.jsonl"
    options = ("--model", base, "--val_dataset", data, "--result_path", out, "--max_new_tokens", 2)
    assert infer(*options) == 0
    (base / "generation_config.json").write_text('{"do_sample": true, "temperature": 2.0}')
    assert infer(*options) == 2 and "another request" in capsys.readouterr().err
    (base / "generation_config.json").unlink()
    out.unlink()
    assert infer(*options) == 0
    weights = sorted(base.glob("*.safetensors"))[0]
    save_file({k: t + 1 for k, t in load_file(weights).items()}, weights, {"format": "pt"})
    assert infer(*options) == 2 and "another request" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["d.jsonl/r.jsonl", ".", "x" * 300, "pipe"])
def test_a_place_that_cannot_hold_results_is_refused_before_loading(
    base: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset(tmp_path / "d.jsonl")
    os.mkfifo(tmp_path / "pipe")
    (base / "tokenizer.json").unlink()  # loading would stumble over it
    assert infer("--model", base, "--val_dataset", data, "--result_path", tmp_path / where) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_results_are_written_by_one_run_at_a_time(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    data, out = dataset(tmp_path / "d.jsonl"), tmp_path / "r.jsonl"
    with open(out, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert infer("--model", base, "--val_dataset", data, "--result_path", out) == 2
    assert "another run is writing" in capsys.readouterr().err and not out.read_bytes()


def test_a_full_disk_is_told_and_a_rerun_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out, whole = dataset(tmp_path / "d.jsonl"), tmp_path / "r.jsonl", tmp_path / "whole.jsonl"
    options = ("--model", base, "--val_dataset", data, "--max_new_tokens", 2)
    assert infer(*options, "--result_path", whole) == 0
    room = [len(whole.read_bytes()) // 2]

    class Full(batch.FileIO):
        def write(self, content: Any) -> int:
            if not room[0]:
                raise OSError(28, "No space left on device")
            written = super().write(bytes(content)[: room[0]])
            room[0] -= written
            return written

    with monkeypatch.context() as patch:
        patch.setattr(batch, "FileIO", Full)
        assert infer(*options, "--result_path", out) == 2
    assert "No space left" in capsys.readouterr().err
    assert whole.read_bytes().startswith(out.read_bytes()) and not out.read_bytes().endswith(b"\n")
    assert infer(*options, "--result_path", out) == 0 and out.read_bytes() == whole.read_bytes()


def test_a_sample_is_the_same_each_time(base: Path, tmp_path: Path) -> None:
    data = dataset(tmp_path / "d.jsonl", [{"prompt": "abcdefghij"[i]} for i in range(10)])
    found = []
    for name in ("a", "b"):
        out = tmp_path / name
        assert (
            infer(
                "--model",
                base,
                "--val_dataset",
                data,
                "--val_dataset_sample",
                3,
                "--result_path",
                out,
                "--max_new_tokens",
                1,
            )
            == 0
        )
        found.append([r["line"] for r in results(out)])
    assert len(found[0]) == 3 and found[0] == found[1]


def test_one_prompt_on_the_command_line(
    base: Path, plain_lora: Path, live: TorchBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--model",
        base,
        "--adapters",
        plain_lora,
        "--prompt",
        "hello",
        "--max_new_tokens",
        10,
        "--temperature",
        0,
    )
    request = Request(prompt_tokens(live.tokenizer, "hello", None, True), GREEDY)
    expected = live.generate([request])[0]
    for more in ((), ("--merge_lora", "true"), ("--stream", "false"), ("--infer_backend", "transformers")):
        assert infer(*options, *more) == 0
        assert capsys.readouterr().out == expected.text + "\n"
    assert infer(*options, "--json") == 0
    assert json.loads(capsys.readouterr().out)["completion_tokens"] == expected.completion_tokens
    assert infer(*options, "--use_chat_template", "false") == 0
    plain = live.generate([ask(live, "hello")])[0].text
    assert capsys.readouterr().out == plain + "\n" and plain != expected.text


# --- vectors ----------------------------------------------------------------------------------------


def test_scores_are_those_of_the_head(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, "bert")
    adapter = kit.adapter("bert-classifier")
    backend = TorchBackend(source_of(base, [adapter], task="seq_cls"))
    adapted = load_peft(MODELS["bert"].load(base), adapter)
    prompts = [(4, 5, 6), (7, 8), (9, 4, 5, 6, 7)]
    for tokens, scores in zip(prompts, backend.vectors(prompts), strict=True):
        with torch.no_grad():
            expected = adapted(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="makes no text"):
        backend.generate([Request((4, 5))])


@pytest.mark.parametrize(("model", "said", "how"), [
    ("bert-headless", None, "mean"), ("bert-headless", "pooling_mode_cls_token", "cls"), ("qwen2", None, "last"),
])  # fmt: skip
def test_embeddings_are_pooled_as_the_checkpoint_says(
    kit: Kit, tmp_path: Path, model: str, said: str | None, how: str
) -> None:
    base = talking(kit, tmp_path, model)
    if said:
        (base / "1_Pooling").mkdir()
        (base / "1_Pooling/config.json").write_text(json.dumps({said: True, "pooling_mode_max_tokens": False}))
    backend = TorchBackend(source_of(base, task="embedding"))
    prompts = [(4, 5, 6), (7, 8, 9, 10, 11)]
    for tokens, vector in zip(prompts, backend.vectors(prompts), strict=True):
        with torch.no_grad():
            states = backend.model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        pooled = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[how]
        torch.testing.assert_close(torch.tensor(vector), pooled / pooled.norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "context"), [("Roberta", 30), ("MPNet", 32), ("Bert", 34), ("GPT2", 34)])
def test_a_text_may_fill_all_positions_that_a_model_has_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, context: int
) -> None:
    """34 rows of positions: RoBERTa numbers tokens from its padding (3) + 1 on, MPNet from 2 on, the others from 0."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=34, pad_token_id=3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with third_party():
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / "base")
    base = add_tokenizer(tmp_path / "base")
    rows = [{"prompt": "a" * n} for n in (context - 1, context)]  # and <s> before them
    out = tmp_path / "r.jsonl"
    options = ("--model", base, "--task_type", "embedding", "--result_path", out, "--max_batch_size", 2)
    assert infer(*options, "--val_dataset", dataset(tmp_path / "d.jsonl", rows)) == 0
    assert f"d.jsonl:2  the text has {context + 1} tokens, and the model takes {context}" in capsys.readouterr().err
    assert [r["line"] for r in results(out)] == [f"{tmp_path}/d.jsonl:1"]
    assert infer("--model", base, "--task_type", "embedding", "--prompt", "a" * context) == 2
    assert "shorten it" in capsys.readouterr().err


def test_what_ends_a_text_is_part_of_what_is_embedded(kit: Kit, tmp_path: Path) -> None:
    """RoBERTa's `</s>`, and the end that embedding models pool; only a text that is to go on is without it."""
    from tokenizers import processors

    base = talking(kit, tmp_path, "qwen2")
    backend = TorchBackend(source_of(base, task="embedding"))
    backend.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    (asked,) = batch.make_requests(
        backend, [make_row({"text": "ab"}, "d:1")], GREEDY, identity="", use_template=False, task="embedding"
    )
    whole = tuple(backend.tokenizer("ab")["input_ids"])
    assert asked.request.tokens == whole and whole[-1] == 1
    assert prompt_tokens(backend.tokenizer, "ab", None, False, closed=True) == whole
    assert prompt_tokens(backend.tokenizer, "ab", None, False) == whole[:-1]


def test_layers_behind_the_pooling_are_refused(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, "bert-headless")
    steps = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
    (base / "modules.json").write_text(json.dumps(steps))
    assert TorchBackend(source_of(base, task="embedding")).vectors([(4,)])
    (base / "modules.json").write_text(json.dumps([*steps, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(InputError, match=r"modules\.json: has Dense"):
        TorchBackend(source_of(base, task="embedding")).vectors([(4,)])


def test_unknown_pooling_is_refused(kit: Kit, tmp_path: Path) -> None:
    base = talking(kit, tmp_path, "bert-headless")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InputError, match="pooling_mode_max_tokens"):
        TorchBackend(source_of(base, task="embedding")).vectors([(4,)])


# --- requests that cannot be met --------------------------------------------------------------------


@pytest.mark.parametrize(("words", "said"), [
    (["--infer_backend", "abacus"], "invalid choice"),
    (["--merge_lora", "true"], "nothing to merge"),
    (["--prompt", "a", "--device_map", "toaster"], "not a device"),
    (["--prompt", "a", "--device_map", "meta"], "not a device"),
    (["--prompt", "a", "--device_map", "xpu"], "0 such devices"),
    (["--prompt", "a", "--max_model_len", "0"], "--max_model_len must be positive"),
    (["--prompt", "a", "--temperature", "1e-9"], "temperature"),
    (["--prompt", "a", "--result_path", "r.jsonl"], "belongs to --val_dataset"),
    (["--prompt", "a\udcff"], "no character"),
    (["--prompt", "a", "--temperature", "-1"], "temperature"),
    (["--prompt", "a", "--max_new_tokens", "99"], "context is 32"),
    (["--prompt", "a", "--max_model_len", "64"], "--max_model_len 64"),
    (["--prompt", "a", "--vllm_max_num_seqs", "8"], "--infer_backend vllm"),
    (["--task_type", "seq_cls"], "makes no conversation"),
    (["--val_dataset", "no-such-file.jsonl"], "no such file"),
    (["--prompt", "a", "--val_dataset", "x.jsonl"], "give one"),
])  # fmt: skip
def test_bad_requests_end_with_one_message(
    base: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer("--model", base, *words) == 2
    assert said in capsys.readouterr().err


def test_code_of_a_checkpoint_is_not_run_unless_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    (base / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_json(
        base / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    )
    assert infer("--model", base, "--prompt", "a") == 2
    assert "--trust_remote_code true" in capsys.readouterr().err and not marker.exists()


OWN = {
    "configuration_own.py": """
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own-tiny"

    def __init__(self, vocab_size=40, hidden_size=16, max_position_embeddings=32, **more):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, 1
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**{"tie_word_embeddings": False, **more})
""",
    "modeling_own.py": """
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_own import OwnConfig


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.inner = nn.Linear(config.hidden_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return CausalLMOutputWithPast(logits=self.lm_head(self.inner(self.embed_tokens(input_ids).cumsum(1)).sin()))
""",
}


def test_a_class_of_the_checkpoints_own_runs_when_it_is_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    base = tmp_path / "base"
    base.mkdir()
    for name, code in OWN.items():
        (base / name).write_text(code)
    add_tokenizer(base)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    with third_party():
        config, cls = (get_class_from_dynamic_module(c, str(base)) for c in classes.values())
        model = cls(config(architectures=["OwnForCausalLM"]))
        randomise(model, 1)
        model.save_pretrained(base)
    edit_json(base / "config.json", auto_map=classes)
    adapted = new_peft_model(model, {"r": 3, "target_modules": ["inner", "lm_head"]}, 4)
    adapter = save_adapter(adapted, tmp_path / "a", copies=False)
    options = ("--model", base, "--adapters", adapter)
    prompts = dataset(tmp_path / "p.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    checks = ("--prompts", prompts, "--new_tokens", 4, "--draws", 1)
    for command in (["infer", "--prompt", "a"], ["serve", "--port", 0], ["compare", *checks]):
        capsys.readouterr()
        assert main([str(w) for w in (*command, *options)]) == 2
        said = capsys.readouterr().err
        assert "pass --trust_remote_code true" in said and "own-tiny" in said and "You are using" not in said
    wanted = logits(adapted)
    for merge in (False, True):
        backend = TorchBackend(source_of(base, [adapter], trust_remote_code=True, merge=merge))
        torch.testing.assert_close(logits(backend.model), wanted, rtol=1e-4, atol=1e-4)
        prompt = (4, 5, 6)
        with torch.no_grad():
            token = int(adapted(input_ids=torch.tensor([prompt])).logits[0, -1].argmax())
        reply = backend.generate([Request(prompt, Sampling(max_new_tokens=1, temperature=0))])[0]
        assert reply.text == backend.tokenizer.decode([token], skip_special_tokens=True)
    assert main([str(w) for w in ("compare", *options, *checks, "--quiet", "--trust_remote_code", "true")]) == 0


# --- devices ----------------------------------------------------------------------------------------

PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu"}


@pytest.mark.parametrize(("places", "said"), [
    ({**PLACES, "model.rotary_emb": "cpu", "lm_hed": "cpu"}, "names lm_hed, which Qwen2ForCausalLM has not; there are lm_head"),
    ({**PLACES, "model.rotary_emb": "cpu"}, "no device for lm_head;"),
    ({"model.layers": "cpu", "lm_head": "cpu"}, "no device for model.embed_tokens, model.norm, model.rotary_emb;"),
    ({"": "gpu"}, "'gpu' is not a device"),
    ({"": "cuda:99"}, "this machine has"),
    ({"": 99}, "this machine has"),
    ({"": "meta"}, "meta"),
    ({"": None}, "which is no device"),
    ({}, "is empty"),
])  # fmt: skip
def test_a_device_for_each_module_names_all_of_them_and_no_others(
    base: Path, places: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert infer("--model", base, "--prompt", "a", "--device_map", json.dumps(places)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
def test_modules_go_where_the_map_puts_them(kit: Kit, tmp_path: Path, tied: bool) -> None:
    base = talking(kit, tmp_path, "qwen2-tied" if tied else "qwen2")
    (tmp_path / "map.json").write_text(json.dumps({"model": "cpu"} if tied else {"model": "cpu", "lm_head": "cpu"}))
    backend = TorchBackend(source_of(base, device_map=str(tmp_path / "map.json")))
    assert torch.equal(logits(backend.model), logits(TorchBackend(source_of(base)).model))


def test_a_missing_extra_is_named(base: Path, monkeypatch: pytest.MonkeyPatch, plain_lora: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(InputError, match=r"inlay\[infer\]"):
        TorchBackend(source_of(base, [plain_lora]))


def test_engine_flags_are_passed_through() -> None:
    words = [
        "--model",
        "m",
        "--vllm_max_num_seqs",
        "8",
        "--vllm_enforce_eager",
        "--vllm_dtype=half",
        "--vllm_engine_kwargs",
        "{}",
    ]
    assert engine_words(words) == [
        "--model", "m", "--vllm", "max_num_seqs=8", "--vllm", "enforce_eager", "--vllm", "dtype=half", "--vllm_engine_kwargs", "{}",
    ]  # fmt: skip


def test_an_unknown_backend_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match="unknown backend"):
        open_backend("abacus", source_of(base))


def test_a_table_of_rows_is_read_without_answers(tmp_path: Path) -> None:
    data = dataset(tmp_path / "d.jsonl", [{"instruction": "say", "input": "x"}, {"text": "go on"}])
    rows = batch.read_prompts([data], None)
    assert [m["content"] for m in rows[0].prompt] == ["say\nx"] and rows[1].text == "go on"
