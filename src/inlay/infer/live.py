"""Base + adapters unmerged, through PEFT, each adapter with its own scaling, their sum over several.

PEFT drops, or scales wrongly, what it does not place (adapters named after an older transformers: peft 0.21, seen in
runs of it); then it says so at most in a warning. So it is asked only for what it gets right, and its result is looked
at. `Unfit` says why an adapter cannot be left unmerged; the caller merges while loading instead.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

from inlay.adapters.adapter import PEFT, Adapter
from inlay.errors import InputError
from inlay.extras import needs
from inlay.infer.backend import CAUSAL, Source


class Unfit(Exception):
    """Why PEFT cannot run an adapter beside this base as it was trained."""


def check_request(source: Source) -> None:
    """Raises Unfit for what the adapters' configs rule out already."""
    if source.task != CAUSAL:
        raise Unfit(f"models for {source.task} are loaded with their adapters merged")
    if source.combine_by != "sum" and len(source.adapters) > 1:
        raise Unfit(f"--combine {source.combine_by} makes other weights than the sum of the adapters")
    for adapter in source.adapters:
        if adapter.format != PEFT:
            raise Unfit(f"{adapter.name} is in the form of {adapter.format}, not of PEFT")
        if source.combine_by == "override" and adapter.full:
            raise Unfit(f"{adapter.name} brings full copies, and one of them is to override another")
    if len({a.config.peft_type for a in source.adapters}) > 1:
        raise Unfit("adapters of different methods cannot be active together in PEFT")
    single = [a.name for a in source.adapters if not _is_plain(a)]
    if single and len(source.adapters) > 1:
        raise Unfit(f"{single[0]} is more than pairs for LoRA, of which PEFT cannot run several together")
    if single and source.weights and any(w != 1 for w in source.weights):
        raise Unfit(f"{single[0]} is more than pairs for LoRA, to which PEFT can give no weight")


def _is_plain(adapter: Adapter) -> bool:
    """LoRA pairs and nothing else, so that the sum of several is what PEFT computes."""
    config = adapter.config
    others = config.trainable_token_indices or config.target_parameters or config.variant or config.lora_bias
    return config.peft_type == "LORA" and not config.use_dora and not adapter.full and not others


def with_adapters(model: Any, source: Source) -> Any:
    """The PeftModel around `model`, all adapters active. Raises Unfit; then `model` must not be used any more."""
    with needs("infer", "adapters that stay unmerged"):
        import peft
    for adapter in source.adapters:
        _check_names(model, adapter)
    names = [f"adapter{i}" for i in range(len(source.adapters))]
    device = str(next(model.parameters()).device)
    wrapped: Any = None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name, adapter in zip(names, source.adapters, strict=True):
            try:
                if wrapped is None:
                    wrapped = peft.PeftModel.from_pretrained(model, adapter.path, name, torch_device=device)
                else:
                    wrapped.load_adapter(adapter.path, name, torch_device=device)
            except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, ImportError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise Unfit(f"PEFT cannot load {adapter.name}: {reason:.200}") from error
            _check_loaded(wrapped, name, adapter)
    if missing := next((str(w.message) for w in said if "missing adapter keys" in str(w.message)), None):
        raise Unfit(f"PEFT found no tensors in the files for some modules: {missing:.200}")
    wrapped.base_model.set_adapter(names)
    _weigh(wrapped, names, source.weights)
    wrapped.requires_grad_(False)
    return wrapped.eval()


def _check_names(model: Any, adapter: Adapter) -> None:
    """Modules and full copies must be those of this class; PEFT drops others, or loads them scaled wrongly."""
    modules = dict(model.named_modules())
    # PEFT nests a module that it adapts in several places.
    adapted = {name: re.sub(r"(\.base_layer)+$", "", name) for name in adapter.parts}
    if outside := sorted(n for n, plain in adapted.items() if plain not in modules):
        raise Unfit(f"{adapter.name} names modules as another transformers had them, such as {outside[0]}")
    if other := sorted(plain for plain in adapted.values() if _does_more(modules[plain])):
        kind = type(modules[other[0]]).__name__
        raise Unfit(f"PEFT takes {other[0]} for a plain Linear, and it is a {kind} with a forward of its own")
    held = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name, tensor in adapter.full.items():
        own = name.replace(".base_layer", "")
        if held.get(own) != tensor.shape:
            raise Unfit(f"{adapter.name} brings {name} of shape {tensor.shape}, where the model has {held.get(own)}")


def _does_more(module: Any) -> bool:
    """Whether a Linear returns something else than its product, as a router of Llama 4 does."""
    import torch

    return isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward


def _check_loaded(wrapped: Any, name: str, adapter: Adapter) -> None:
    """Every part of the file is in the model now. Shared parts, and names that PEFT changes, are not looked at."""
    import peft
    import torch

    if adapter.config.peft_type != "LORA":
        return
    state = peft.get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    lost = [t.key for parts in adapter.parts.values() for t in parts.values() if t.key not in state]
    if lost:
        raise Unfit(f"PEFT dropped {len(lost)} tensors of {adapter.name}, such as {lost[0]}")
    bad = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise InputError(f"{bad[0]}: NaN or Inf in adapter {adapter.name}")


def _weigh(wrapped: Any, names: Sequence[str], weights: Sequence[float] | None) -> None:
    """A factor for each adapter, on the scaling of its every layer."""
    for name, weight in zip(names, weights or (), strict=False):
        if weight == 1:
            continue
        for module in wrapped.modules():
            scaling = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and name in scaling:
                scaling[name] *= weight
