"""Do base + adapters, and what they were merged to, behave alike? Measured on prompts, judged by a measured tolerance.

All models compute in float32, on weights as they are stored, so that the difference between base + adapters and a
right merge is what rounding the merged weights makes, and nothing that 16-bit arithmetic would add. How much that is
depends on the model, and is measured: the exact merge is rounded anew, at random to one of the two neighbours in the
same type (`rounding`), a few times; each of these draws is a right merge. A merge fails if it is farther from
base + adapters than `MARGIN` times the farthest draw (`verdict`).

    base ───────────────────┐ adapter effect: larger than the tolerance, or the adapters do nothing
    base + adapters (PEFT) ─┤ reference
    merged ─────────────────┤ difference: at most the tolerance
    draws, 1 … n ───────────┘ tolerance

One model is in memory at a time, and beside it the reference's logits: 4 bytes · positions · vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from inlay.checkpoints.checkpoint import open_checkpoint
from inlay.checkpoints.decoded import quantisation
from inlay.datasets.row import Row, make_row
from inlay.dtypes import DTYPES
from inlay.errors import InputError
from inlay.infer import live
from inlay.infer.backend import Request, Sampling, Source, check_base, check_length
from inlay.infer.batch import read_prompts
from inlay.infer.chat import prompt_tokens, text_tokens
from inlay.infer.description import context_of, read_tokenizer
from inlay.infer.detokenise import Detokeniser
from inlay.infer.distance import Distance, distance, together
from inlay.infer.loading import load_model
from inlay.infer.pt import end_tokens, make_source_plan
from inlay.infer.rounding import stochastic
from inlay.infer.verdict import Behaviour, PromptResult
from inlay.plan.build import make_plan
from inlay.plan.combination import Options
from inlay.plan.quant import Quant
from inlay.plan.types import Entry, Plan
from inlay.records.manifest import is_sealed, read_manifest

DRAWS = 3
NEW_TOKENS = 32
FLOAT32 = "float32"
Say = Callable[[str], None]


def read_rows(prompts: Path | None) -> list[Row]:
    """The prompts of a dataset, or those that come with the package. A bad row is an InputError."""
    if prompts is not None:
        return read_prompts([prompts], None)
    import json

    lines = files("inlay.infer").joinpath("prompts.jsonl").read_text("utf-8").splitlines()
    return [make_row({**json.loads(line), "completion": ""}, f"prompts:{i}") for i, line in enumerate(lines, 1)]


def compare(
    source: Source,
    *,
    merged: Path | None = None,
    prompts: Sequence[Row] | None = None,
    new_tokens: int = NEW_TOKENS,
    draws: int = DRAWS,
    seed: int = 42,
    use_template: bool | None = None,
    system: str | None = None,
    say: Say = lambda _: None,
) -> Behaviour:
    """Base, base + adapters and merged, on prompts and on what base + adapters goes on with.

    `merged` is a directory made by any tool; without it the tensors that a run would write are compared. `use_template`
    None uses a chat template where there is one. Raises InputError where the adapters cannot stay unmerged, or `merged`
    is in codes.
    """
    rows = read_rows(None) if prompts is None else prompts
    _check_request(source, rows, new_tokens, draws)
    if merged is not None and quantisation(open_checkpoint(merged)) is not None:
        raise InputError(
            f"{merged}: holds codes, whose grid is far coarser than roundings; compare the 16-bit merge, and let "
            "`inlay plan` with the same options say how much of the adapters survives in codes"
        )
    if merged is None:
        plan = told = make_source_plan(source, source.adapters)
    else:
        told = make_plan(merged, [])
        source, plan = _as_stored(_as_recorded(source, merged), told)
    check = _Check(source, plan, rows, new_tokens, use_template, system)
    say("base + adapters")
    check.unmerged()
    say("base")
    check.alone()
    say("merged")
    found = check.against(told)
    distances = []
    for i in range(draws):
        say(f"the merge rounded in another way, {i + 1} of {draws}")
        distances.append(check.draw(plan, seed + i))
    return Behaviour(
        tuple(check.results(found)), together(found), together(check.base), tuple(distances),
        str(merged) if merged else "merged while loading",
    )  # fmt: skip


def _check_request(source: Source, rows: Sequence[Row], new_tokens: int, draws: int) -> None:
    if not source.adapters:
        raise InputError("give --adapters: base + adapters is what merged is compared with")
    if not rows:
        raise InputError("there is no prompt to compare on")
    for name, value in (("new_tokens", new_tokens), ("draws", draws)):
        if value < 1:
            raise InputError(f"--{name} must be positive, not {value}")
    check_base(source)


def _as_stored(source: Source, told: Plan) -> tuple[Source, Plan]:
    """With the 16-bit type that all of `told` is stored in, where the base has float32 and no type is given; the plan.

    A merge that another tool wrote in 16 bits is rounded to them, and is judged by such roundings.
    """
    plan = make_source_plan(source, source.adapters)
    types = {e.dtype for e in told.entries.values() if e.dtype.mergeable}
    wide = any(e.dtype.torch == FLOAT32 for e in plan.weights.values() if not e.copied)
    if source.torch_dtype is None and wide and len(types) == 1 and (only := types.pop()).bits == 16:
        source = replace(source, torch_dtype=only.torch)
        plan = make_source_plan(source, source.adapters)
    return source, plan


def _as_recorded(source: Source, merged: Path) -> Source:
    """With the weights, type and way to combine that the manifest of `merged` records, where others are not given."""
    manifest = read_manifest(merged) if is_sealed(merged) else None
    if manifest is None:
        return source
    recorded = manifest["settings"]
    if source.weights is None and [a["digest"] for a in manifest["adapters"]] == [a.digest for a in source.adapters]:
        source = replace(source, weights=tuple(float(a["weight"]) for a in manifest["adapters"]))
    if source.torch_dtype is None and recorded.get("dtype"):
        source = replace(source, torch_dtype=DTYPES[recorded["dtype"]].torch)
    if source.combine_by == "sum" and not source.options.given():
        options = Options(**recorded.get("options", {}))
        source = replace(source, combine_by=recorded.get("combine", "sum"), options=options)
    return source if source.quant.given() else replace(source, quant=Quant(**recorded.get("quant", {})))


class _Check:
    """The prompts, and the reference's logits on them."""

    def __init__(
        self, source: Source, plan: Plan, rows: Sequence[Row], new_tokens: int, use_template: bool | None,
        system: str | None,
    ) -> None:  # fmt: skip
        self.source, self.rows, self.new_tokens = source, rows, new_tokens
        self.tokenizer = read_tokenizer(plan, source.trust_remote_code)
        if use_template is None:
            use_template = bool(getattr(self.tokenizer, "chat_template", None))
        self.prompts = [self._tokens(row, use_template, system) for row in rows]
        self.sequences: list[tuple[int, ...]] = []
        self.reference: list[Any] = []
        self.base: list[Distance] = []
        self.texts: dict[str, list[str]] = {}

    def _tokens(self, row: Row, use_template: bool, system: str | None) -> tuple[int, ...]:
        if row.text is not None:
            return text_tokens(self.tokenizer, row.text)
        tools = row.tools if use_template else ()
        return prompt_tokens(
            self.tokenizer, list(row.prompt), system if use_template else None, use_template, tools=tools
        )

    def _load(self, plan: Plan, **more: Any) -> Any:
        s = self.source
        return load_model(
            plan, device_map=s.device_map, attn_impl=s.attn_impl, trust_remote_code=s.trust_remote_code, dtype=FLOAT32,
            **more,
        )[0]  # fmt: skip

    def _load_base(self) -> Any:
        """In float32 what is stored is not rounded once more, whatever type the merge is written in."""
        return self._load(make_source_plan(replace(self.source, torch_dtype=FLOAT32), []))

    def unmerged(self) -> None:
        """Logits and texts of base + adapters: the reference."""
        try:
            live.check_request(self.source)
            model = self._load_base()
            self._check_context(model)
            wrapped = live.with_adapters(model, self.source)
        except live.Unfit as reason:
            raise InputError(
                f"base + adapters cannot run unmerged ({reason}), so there is nothing to compare with; `inlay verify` "
                "checks the tensors"
            ) from None
        inner = wrapped.get_base_model()
        replies = [self._greedy(inner, prompt) for prompt in self.prompts]
        self.sequences = [(*prompt, *reply) for prompt, reply in zip(self.prompts, replies, strict=True)]
        self.texts["adapters"] = self._texts(replies)
        self.reference = [_logits(inner, sequence) for sequence in self.sequences]

    def _check_context(self, model: Any) -> None:
        context = context_of(model.config, None, model)
        for row, prompt in zip(self.rows, self.prompts, strict=True):
            try:
                check_length(Request(prompt, Sampling(max_new_tokens=self.new_tokens)), context)
            except InputError as error:
                raise InputError(f"{row.where}  {error}") from None

    def alone(self) -> None:
        """Distances and texts of the base. Loaded anew: PEFT's `disable_adapter` leaves trained biases in place."""
        self.base = self._measure("base", self._load_base())

    def against(self, plan: Plan) -> list[Distance]:
        """Distances of the model of a plan, and its greedy texts."""
        model = self._load(plan)
        size, wanted = model.get_output_embeddings().weight.shape[0], self.reference[0].shape[-1]
        if size < wanted:
            raise InputError(f"{plan.base_name}: has a vocabulary of {size} tokens, base + adapters one of {wanted}")
        return self._measure("merged", model)

    def _measure(self, name: str, model: Any) -> list[Distance]:
        self.texts[name] = self._texts([self._greedy(model, prompt) for prompt in self.prompts])
        return self._distances(model)

    def draw(self, plan: Plan, seed: int) -> Distance:
        """Distance of the same merge, its weights rounded in another way."""
        import torch

        exact = make_source_plan(replace(self.source, torch_dtype=FLOAT32), self.source.adapters)

        def finish(entry: Entry, tensor: Any) -> Any:
            wanted = plan.weights[entry.key]
            if wanted.copied or not wanted.dtype.mergeable or tensor.dtype != torch.float32:
                return tensor
            # A seed of its own for each tensor, as threads make them in any order; torch uses 32 bits of it.
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {entry.key}".encode()))
            return stochastic(tensor, getattr(torch, wanted.dtype.torch), generator)

        return together(self._distances(self._load(exact, finish=finish)))

    def _distances(self, model: Any) -> list[Distance]:
        pairs = zip(self.reference, self.sequences, strict=True)
        return [distance(known, _logits(model, tokens)) for known, tokens in pairs]

    def results(self, merged: Sequence[Distance]) -> list[PromptResult]:
        shown = [self.tokenizer.decode(p, skip_special_tokens=True) for p in self.prompts]
        columns = (
            self.rows,
            shown,
            merged,
            self.base,
            self.texts["base"],
            self.texts["adapters"],
            self.texts["merged"],
        )
        return [PromptResult(row.where, *rest) for row, *rest in zip(*columns, strict=True)]

    def _greedy(self, model: Any, prompt: tuple[int, ...]) -> list[int]:
        """The most likely tokens, one after another, whatever the model's generation_config.json says."""
        import torch

        ends = end_tokens(model, self.tokenizer)
        with torch.inference_mode():
            ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=_plain_greedy(self.new_tokens, ends),
            )
        tokens: list[int] = made[0, len(prompt) :].tolist()
        return tokens

    def _texts(self, replies: Sequence[list[int]]) -> list[str]:
        found = []
        for prompt, reply in zip(self.prompts, replies, strict=True):
            text = Detokeniser(self.tokenizer, prompt)
            found.append(text.add(reply) + text.finish())
        return found


def _plain_greedy(new_tokens: int, ends: set[int]) -> Any:
    import transformers

    made: Any = transformers.GenerationConfig
    return made(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=min(ends, default=0)
    )


def _logits(model: Any, tokens: tuple[int, ...]) -> Any:
    """Logits at every position, float32 on the CPU, (positions, vocabulary)."""
    import torch

    with torch.inference_mode():
        ids = torch.tensor([tokens], device=model.get_input_embeddings().weight.device)
        return model(input_ids=ids).logits[0].float().cpu()
