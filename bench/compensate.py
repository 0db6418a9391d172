"""Does it pay to choose 4-bit codes by what the adapter does? Plain rounding against compensated.

    python bench/compensate.py --models ../shared/data/models --adapters ../shared/data/adapters \
        --text ../shared/data/text/tiny_shakespeare.txt
    python bench/compensate.py … --seeds 0 --formats w4a16 --scales reuse        # a part of it

With W = W0 + s B A the merged weight of a layer and Q what its codes decode to, outputs err by (Q − W) x. With
d = q − w of one row, codes are chosen for a small d H dᵀ, H = I + c G:

    plain        G = 0: each value to its nearest code
    whole        G = δδᵀ with δ the row's own delta, c → ∞: the row keeps its delta whole (inlay.codecs.compensation)

and, from the first column to the last, what a column errs by made up for in those after it (OBQ, GPTQ, LDLQ):

    row m        as whole, with m = c · ‖δ‖²
    adapter m    G = AᵀA, the directions that the adapter reads, m = c · ‖A‖² / in
    delta m      G = (BA)ᵀBA, which weighs what A reads by what B makes of it
    random m     G = RᵀR, R as large as A and random: what compensation by a matrix that knows nothing does
    calibrated   H = XᵀX / n + 1 %, with the inputs on text that is not that of the perplexity: how much there is
                 to win, for those who have text

Models are small and trained; adapters are LoRA on Tiny Shakespeare: one of PEFT's on stories260K (trained on the float
base), and for each learning rate and seed one on babyllama-105, trained here for a minute on the base as its codes
decode. Figures: perplexity on held-out text; output error ‖(Q − W) X‖ / ‖W X‖ over all layers; the share of the delta
that is kept, ⟨Q − W0, Δ⟩ / ‖Δ‖². Embeddings and norms stay in floats. Needs torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from inlay.codecs import compensation
from inlay.codecs.table import codec
from inlay.quantising.perplexity import perplexity

F64Array = npt.NDArray[np.float64]
Layers = dict[str, F64Array]

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GROUP = 32
# Codec, its options, and bytes of codes that are all number c.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "w4a16": ("compressed_pack", {"scheme": "W4A16", "group_size": GROUP, "scale_dtype": "F16"}),
    "w4a16_asym": ("compressed_pack", {"scheme": "W4A16_ASYM", "group_size": GROUP, "scale_dtype": "F16"}),
    "nf4": ("bnb4", {"blocksize": GROUP, "double_quant": False, "dtype": "float32"}),
}
METHODS = (
    ("plain", 0.0), ("whole", 0.0), ("row", 10.0), ("adapter", 0.1), ("adapter", 1.0), ("adapter", 10.0),
    ("delta", 1.0), ("random", 1.0), ("calibrated", 0.0),
)  # fmt: skip
STEPS, BATCH, LENGTH, RANK, ALPHA = 120, 8, 128, 16, 32
RATES = (1e-4, 5e-4, 3e-3)  # of learning: deltas far below the steps of the codes, below them, and like them
PIECE = 1000  # characters
HELD_OUT, CALIBRATION = 15_000, 15_000  # characters, from the end of the text and before them


@dataclass(frozen=True)
class Stored:
    """A weight in codes: its codec's settings and parts."""

    form: Any
    settings: Mapping[str, Any]
    parts: Mapping[str, Any]

    @classmethod
    def of(cls, weight: F64Array, name: str, kept: Mapping[str, Any] | None = None) -> Stored:
        form_name, options = FORMATS[name]
        form, w = codec(form_name), weight.astype(np.float32)
        if name != "nf4" and w.shape[1] % GROUP:  # 172 columns of stories260K: a scale a row
            options = {**options, "group_size": w.shape[1]}
        settings = form.fresh(w.shape, options)
        return cls(form, settings, {**form.encode(w, settings, 0, kept or {}), **(kept or {})})

    @property
    def scales(self) -> dict[str, Any]:
        return {p: a for p, a in self.parts.items() if p not in ("weight", "weight_packed", "weight_shape")}

    def decoded(self, codes: Mapping[str, Any] | None = None) -> F64Array:
        rows = self.settings["shape"][0]
        return self.form.decode({**self.parts, **(codes or {})}, self.settings, 0, rows).astype(np.float64)

    def compensated(self, merged: F64Array, base: F64Array) -> dict[str, Any]:
        """The codes of --compensate adapter."""
        name, known = self.form.__name__.rpartition(".")[2], self.scales
        values = compensation.compensated(
            self.form, name, self.settings, 0, merged.astype(np.float32), base.astype(np.float32), known
        )
        part = next(iter(self.form.PARTS))
        return {part: self.form.encode(values, self.settings, 0, known)[part]}

    def levels(self) -> F64Array:
        """The 16 values that each element may take, ascending: (16, out, in)."""
        part = next(iter(self.form.PARTS))
        codes = self.parts[part]
        every = [np.full(codes.nbytes, 17 * c, np.uint8).view(codes.dtype).reshape(codes.shape) for c in range(16)]
        return np.sort(np.stack([self.decoded({part: c}) for c in every]), axis=0)


def nearest(values: F64Array, levels: F64Array) -> F64Array:
    """The level next to each value: (rows), (16, rows)."""
    return levels[np.abs(levels - values).argmin(axis=0), np.arange(len(values))]


def compensated(weight: F64Array, levels: F64Array, hessian: F64Array) -> F64Array:
    """Values of codes for H (in, in), column after column (Frantar et al. 2023, algorithm 1)."""
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    left, result = weight.copy(), np.empty_like(weight)
    for j in range(weight.shape[1]):
        result[:, j] = nearest(left[:, j], levels[:, :, j])
        left[:, j:] -= ((left[:, j] - result[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    return result


def by_row(weight: F64Array, levels: F64Array, delta: F64Array, strength: float) -> F64Array:
    """Values of codes for H = I + c δδᵀ, a δ for each row: the columns that are left have their best in closed form."""
    energy = np.square(delta).sum(axis=1)
    c = strength / np.where(energy == 0, np.inf, energy)
    result, off, rest = np.empty_like(weight), np.zeros(len(weight)), energy.copy()
    for j in range(weight.shape[1]):
        result[:, j] = nearest(weight[:, j] - c * delta[:, j] * off / (1 + c * rest), levels[:, :, j])
        off += delta[:, j] * (result[:, j] - weight[:, j])
        rest -= np.square(delta[:, j])
    return result


def chosen(method: str, strength: float, at: Layer, stored: Stored) -> F64Array:
    """What the codes of one layer decode to."""
    if method == "plain":
        return stored.decoded()
    if method == "whole":
        return stored.decoded(stored.compensated(at.merged, at.base))
    levels = at.levels(stored)
    if method == "row":
        return by_row(at.merged, levels, at.delta, strength)
    width = at.merged.shape[1]
    if method == "calibrated":
        return compensated(at.merged, levels, at.gram + 0.01 * np.trace(at.gram) / width * np.eye(width))
    read = {"adapter": at.a, "delta": at.delta, "random": at.random}[method]
    gram = read.T @ read
    return compensated(at.merged, levels, np.eye(width) + strength * width / max(np.trace(gram), 1e-300) * gram)


@dataclass
class Layer:
    """A layer that the adapter changes: what merging gives, and second moments of its inputs (in, in) on two texts."""

    base: F64Array
    delta: F64Array
    a: F64Array
    random: F64Array
    gram: F64Array
    gram_held_out: F64Array
    known_levels: F64Array | None = None

    def levels(self, stored: Stored) -> F64Array:
        if self.known_levels is None:
            self.known_levels = stored.levels()
        return self.known_levels

    @property
    def merged(self) -> F64Array:
        return self.base + self.delta


@dataclass(frozen=True)
class Case:
    """A model and an adapter of it, which reads the base as `name` stores it."""

    model: Path
    label: str
    factors: Mapping[str, tuple[F64Array, F64Array, float]]


def linear_weights(path: Path) -> dict[str, F64Array]:
    found = load_file(path / "model.safetensors")
    return {k: v.astype(np.float64) for k, v in found.items() if k.split(".")[-2] in MODULES}


def write(path: Path, model: Path, weights: Mapping[str, F64Array]) -> Path:
    """A float32 checkpoint with these weights."""
    import shutil

    from safetensors.numpy import save_file

    path.mkdir(exist_ok=True)
    for file in model.iterdir():
        if file.suffix == ".json":
            shutil.copyfile(file, path / file.name)
    tensors = load_file(model / "model.safetensors")
    new = {k: w.astype(np.float32) for k, w in weights.items()}
    save_file({**tensors, **new}, path / "model.safetensors", {"format": "pt"})
    return path


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def tokens(path: Path, text: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return torch.tensor([t for piece in pieces(text) for t in tokenizer(piece, verbose=False)["input_ids"]])


def pieces(text: str) -> list[str]:
    """The text in pieces, since these tokenizers take time that grows with the square of a text's length."""
    return [text[at : at + PIECE] for at in range(0, len(text), PIECE)]


def trained(path: Path, text: str, seed: int, rate: float) -> dict[str, tuple[F64Array, F64Array, float]]:
    """A, B and the scaling of each module, after `STEPS` steps on the text."""
    torch.manual_seed(seed)
    model = get_peft_model(load(path), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES)))
    ids = tokens(path, text)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(STEPS):
        for group in optimiser.param_groups:
            group["lr"] = rate * (1 - step / STEPS)
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[s : s + LENGTH] for s in starts.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    print(f"trained {path.name}, seed {seed}, rate {rate:g}: loss {loss.item():.3f}", flush=True)
    state = {k: v.detach().numpy() for k, v in model.state_dict().items() if "lora_" in k}
    return factors({k.replace(".default", ""): v for k, v in state.items()}, ALPHA / RANK)


def factors(state: Mapping[str, Any], scaling: float) -> dict[str, tuple[F64Array, F64Array, float]]:
    found = {}
    for name, a in state.items():
        if name.endswith("lora_A.weight"):
            b = state[name.replace("lora_A", "lora_B")]
            key = name.removeprefix("base_model.model.").replace(".lora_A", "")
            found[key] = a.astype(np.float64), b.astype(np.float64), scaling
    return found


def grams(path: Path, text: str) -> dict[str, F64Array]:
    """XᵀX / n of the inputs of every linear layer."""
    model, found, count = load(path), {}, {}
    for name, module in model.named_modules():
        if name.split(".")[-1] in MODULES:

            def seen(_: Any, inputs: Any, name: str = f"{name}.weight") -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
                found[name] = found.get(name, 0) + x.T @ x
                count[name] = count.get(name, 0) + len(x)

            module.register_forward_pre_hook(seen)
    ids = tokens(path, text)
    with torch.no_grad():
        for at in range(0, len(ids) - 1, 256):
            model(ids[None, at : at + 256])
    return {k: g / count[k] for k, g in found.items()}


def cases(args: argparse.Namespace, name: str, text: Texts, at: Path) -> Iterator[Case]:
    """The adapters that are measured in one format."""
    stories, baby = args.models / "stories260K", args.models / "babyllama-105"
    given = args.adapters / "stories260K_shakespeare_lora_r16"
    config = json.loads((given / "adapter_config.json").read_text())
    state = load_file(given / "adapter_model.safetensors")
    decoded = {k: Stored.of(w, name).decoded() for k, w in linear_weights(baby).items()}
    base = write(at / f"base-{name}", baby, decoded)
    for rate, seed in itertools.product(args.rates, args.seeds):
        yield Case(baby, f"babyllama-105, rate {rate:g}, #{seed}", trained(base, text.train, seed, rate))
    yield Case(stories, "stories260K", factors(state, config["lora_alpha"] / config["r"]))


@dataclass(frozen=True)
class Texts:
    train: str
    calibration: str
    held_out: str


def measure(case: Case, name: str, wanted: list[str], text: Texts, at: Path) -> Iterator[dict[str, Any]]:
    """A row of figures for each method."""
    base = {k: Stored.of(w, name) for k, w in linear_weights(case.model).items()}
    decoded = {k: s.decoded() for k, s in base.items()}
    delta = {k: s * b @ a for k, (a, b, s) in case.factors.items()}
    merged = write(at / "merged", case.model, {k: w + delta[k] for k, w in decoded.items()})
    calibration, held_out = grams(merged, text.calibration), grams(merged, text.held_out)
    rng = np.random.default_rng(0)
    read = {k: case.factors[k][0] for k in decoded}
    random = {k: rng.normal(size=a.shape) for k, a in read.items()}
    for what, scales in itertools.product(("base", "16 bit"), wanted):
        weights = decoded if what == "base" else {k: w + delta[k] for k, w in decoded.items()}
        ppl = perplexity(write(at / "merged", case.model, weights), pieces(text.held_out), 256)
        yield {"format": name, "scales": scales, "case": case.label, "method": what, "ppl": ppl}
    for scales in wanted:
        layers = {k: Layer(w, delta[k], read[k], random[k], calibration[k], held_out[k]) for k, w in decoded.items()}
        kept = {k: base[k].scales if scales == "reuse" else None for k in layers}
        again = {k: Stored.of(x.merged, name, kept[k]) for k, x in layers.items()}
        for method, strength in METHODS:
            result = {k: chosen(method, strength, x, again[k]) for k, x in layers.items()}
            path = write(at / "merged", case.model, result)
            yield {
                "format": name, "scales": scales, "case": case.label,
                "method": f"{method} {strength:g}" if strength else method,
                "ppl": perplexity(path, pieces(text.held_out), 256), **figures(layers, result),
            }  # fmt: skip


def figures(layers: Mapping[str, Layer], result: Layers) -> dict[str, float]:
    error = output = kept = energy = 0.0
    for k, x in layers.items():
        off = result[k] - x.merged
        error += float(np.einsum("ij,jk,ik", off, x.gram_held_out, off, optimize=True))
        output += float(np.einsum("ij,jk,ik", x.merged, x.gram_held_out, x.merged, optimize=True))
        kept += float(((result[k] - x.base) * x.delta).sum())
        energy += float(np.square(x.delta).sum())
    return {"output_error": (error / output) ** 0.5, "kept": kept / energy}


def summarise(rows: list[dict[str, Any]]) -> None:
    """For each model and rate: by how much the perplexity of each method is above that of 16 bit."""
    kinds = dict.fromkeys((row["scales"], row["case"].split(", #")[0]) for row in rows)
    for scales, kind in kinds:
        cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in rows:
            if row["scales"] == scales and row["case"].split(", #")[0] == kind:
                cases.setdefault((row["format"], row["case"]), {})[row["method"]] = row
        print(f"\n{kind}, scales {scales}, {len(cases)} cases")
        table(cases)


def table(means: Mapping[tuple[str, str], Mapping[str, Mapping[str, Any]]]) -> None:
    names = [m for m in next(iter(means.values())) if m not in ("base", "16 bit")]
    gain = np.mean([np.log(m["base"]["ppl"] / m["16 bit"]["ppl"]) for m in means.values()])
    print(f"the base itself: {gain:.4f}")
    print(f"{'method':14} {'Δ ln ppl':>9} {'to plain':>9} {'better in':>10} {'output err':>11} {'kept':>6}")
    for name in names:
        above = [np.log(m[name]["ppl"] / m["16 bit"]["ppl"]) for m in means.values()]
        plain = [np.log(m["plain"]["ppl"] / m["16 bit"]["ppl"]) for m in means.values()]
        wins = sum(a < p for a, p in zip(above, plain, strict=True))
        other = [np.mean([m[name][n] for m in means.values()]) for n in ("output_error", "kept")]
        ratio = np.mean(above) / np.mean(plain)
        print(f"{name:14} {np.mean(above):9.4f} {ratio:9.2f} {wins:6d}/{len(means)} {other[0]:11.4f} {other[1]:6.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for folder in ("models", "adapters", "text"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--scales", nargs="+", default=["reuse", "fresh"], choices=["reuse", "fresh"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every row of figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    whole = args.text.read_text()
    text = Texts(whole[: -HELD_OUT - CALIBRATION], whole[-HELD_OUT - CALIBRATION : -HELD_OUT], whole[-HELD_OUT:])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.formats:
            for case in cases(args, name, text, Path(folder)):
                for row in measure(case, name, args.scales, text, Path(folder)):
                    rows.append(row)
                    shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                    print(json.dumps(shown), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    summarise(rows)


if __name__ == "__main__":
    main()
