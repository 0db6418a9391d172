"""From the names in a LoRA for an image model to keys of a diffusers pipeline.

unet.down_blocks.0.….to_q               the component, then its module
lora_unet_down_blocks_0_…_to_q          kohya: looked up among the component's own modules with their dots as
                                        underscores, also under their names in the original U-Net
down_blocks.0.….to_q                    no component: the only one that has such modules
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property

from inlay.adapters.diffusers import COMPONENT
from inlay.checkpoints.checkpoint import Checkpoint
from inlay.keys.memory import Slice
from inlay.keys.names import Names
from inlay.keys.rules import Rule, find_rule, near
from inlay.keys.sgm import original_names

# Prefixes of kohya's trainers -> the components that they may mean, of which the first that is there is meant. Every
# denoiser is "unet" to them; the T5 of Flux, its second encoder, is te3 as that of Stable Diffusion 3.
KOHYA = {
    "lora_unet_": ("unet", "transformer"),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
}
# Models before diffusers converted them, with fused layers that diffusers splits: Flux, SD3, Wan, ComfyUI's prefix.
ORIGINAL_MODELS = ("double_blocks", "single_blocks", "joint_blocks", "diffusion_model", "input_blocks", "output_blocks")
TEXT_MODEL = "text_model_"  # CLIP's prefix, which not every version of transformers stores


class PipelineNames(Names):
    """Finds tensors of a pipeline for one adapter."""

    def __init__(
        self, components: Mapping[str, Checkpoint], shapes: Mapping[str, tuple[int, ...]], names: Sequence[str]
    ) -> None:
        super().__init__({}, shapes, ())
        self.rule = self._rule = PipelineRule(components, names)

    def key(self, name: str) -> str:
        return self._rule.key(name)

    def slices(self, name: str) -> tuple[Slice, ...]:  # noqa: ARG002  (of any name)
        """Nothing: each module of a pipeline has a tensor of its own."""
        return ()

    def why_not(self, name: str) -> str:
        return self._rule.why_not(name)


class PipelineRule:
    """The rules of the components, under the names that one adapter has for each."""

    def __init__(self, components: Mapping[str, Checkpoint], names: Sequence[str]) -> None:
        self._components = {name: _Component(checkpoint) for name, checkpoint in components.items()}
        by_component: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            if self._kohya(name) is None:
                word, _, rest = name.partition(".")
                known = word in components or COMPONENT.fullmatch(word) is not None
                by_component[word if known else ""].append(rest if known else name)
        self._unnamed, self.ambiguous = self._component_of(by_component.pop("", []))
        self._rules = {
            c: find_rule(own, self._components[c].keys) for c, own in by_component.items() if c in components
        }

    def __str__(self) -> str:
        used = sorted({*self._rules, *([self._unnamed[0]] if self._unnamed else [])})
        return f"names looked up in the components of the pipeline{': ' + ', '.join(used) if used else ''}"

    def key(self, name: str) -> str:
        """Key for a name; where it reaches nothing, a name that is no key."""
        if (kohya := self._kohya(name)) is not None:
            candidates, flat = kohya
            component = next((c for c in candidates if c in self._components), None)
            found = self._components[component].by_word(flat) if component else None
            return f"{component}/{found}" if found else name
        word, _, rest = name.partition(".")
        if word in self._components:
            return f"{word}/{self._rules.get(word, Rule()).key(rest)}"
        return f"{self._unnamed[0]}/{self._unnamed[1].key(name)}" if self._unnamed else name

    def why_not(self, name: str) -> str:
        """Why a name reaches nothing, and what to do."""
        kohya = self._kohya(name)
        wanted = kohya[0] if kohya else (name.partition(".")[0],)
        component = next((c for c in wanted if c in self._components), None)
        if component is None and (kohya or COMPONENT.fullmatch(wanted[0])):
            return f"is for {' or '.join(wanted)}, which this pipeline does not have ({', '.join(self._components)})"
        if kohya and component is not None and self._components[component].ambiguous(kohya[1]):
            return f"reaches nothing for sure: several modules of {component} are written so with underscores"
        if any(word in name for word in ORIGINAL_MODELS):
            return (
                "is named as in the model that diffusers converted this one from, and no such module is known here; "
                "load the file with diffusers and save it again (load_lora_weights, save_lora_weights)"
            )
        if self.ambiguous:
            return f"names no component, and {' and '.join(self.ambiguous)} have such modules; put one in front"
        close = near(
            self.key(name), [f"{c}/{k}" for c in wanted if c in self._components for k in self._components[c].keys]
        )
        return "reaches nothing in the pipeline" + (f"; near: {close}" if close else "")

    def _kohya(self, name: str) -> tuple[Sequence[str], str] | None:
        """The components that a name of kohya's trainers may mean, and the rest of it."""
        if not name.startswith("lora_") or name.count(".") != 1:
            return None
        prefixes = {**{f"lora_{c}_": (c,) for c in self._components}, **KOHYA}
        for prefix in sorted(prefixes, key=len, reverse=True):
            if name.startswith(prefix):
                return prefixes[prefix], name.removeprefix(prefix)
        return (name.partition(".")[0],), name

    def _component_of(self, names: Sequence[str]) -> tuple[tuple[str, Rule] | None, list[str]]:
        """The one component that has most of these names, with its rule; or those that have equally many."""
        if not names:
            return None, []
        rules = {c: find_rule(names, own.keys) for c, own in self._components.items()}
        hits = {c: sum(rule.key(n) in self._components[c].keys for n in names) for c, rule in rules.items()}
        best = [c for c in hits if hits[c] == max(hits.values()) > 0]
        return ((best[0], rules[best[0]]), []) if len(best) == 1 else (None, best)


class _Component:
    """The keys of one model of the pipeline."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.keys = checkpoint.tensors.keys()
        self._config = checkpoint.config

    def by_word(self, name: str) -> str | None:
        """The key that is written so with underscores before its last word."""
        word, _, leaf = name.rpartition(".")
        for candidate in (word, word.removeprefix(TEXT_MODEL)):
            found = self._words.get(candidate, ())
            if len(found) == 1 and f"{found[0]}.{leaf}" in self.keys:
                return f"{found[0]}.{leaf}"
        return None

    def ambiguous(self, name: str) -> bool:
        return len(self._words.get(name.rpartition(".")[0], ())) > 1

    @cached_property
    def _words(self) -> Mapping[str, Sequence[str]]:
        """Modules by their names with underscores."""
        modules = [key.removesuffix(".weight") for key in self.keys if key.endswith(".weight")]
        found: defaultdict[str, list[str]] = defaultdict(list)
        for module in modules:
            found[module.replace(".", "_")].append(module)
        layers = self._config.get("layers_per_block")
        if isinstance(layers, int):
            for name, module in original_names(modules, layers).items():
                found[name.replace(".", "_")].append(module)
        return found
