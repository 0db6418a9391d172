"""Tiny models whose names on disk differ from those in memory: experts, vision-language models, fused tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cases import MODELS, Model

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def _of(kind: str, config: str, **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**fields))

    return build


def _without(*names: str) -> dict[str, Any]:
    return {k: v for k, v in TEXT.items() if k not in names}


def _llava() -> Any:
    import transformers

    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=vision))


QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 16,
    "patch_size": 4,
}
FAMILIES: dict[str, Model] = {
    "qwen3moe": Model(_of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **TEXT, **EXPERTS, head_dim=8)),
    "qwen3moe-square": Model(
        _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **TEXT, **{**EXPERTS, "moe_intermediate_size": 16}, head_dim=8)
    ),
    "qwen2moe": Model(_of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **TEXT, **EXPERTS, shared_expert_intermediate_size=20)),
    "mixtral": Model(_of("MixtralForCausalLM", "MixtralConfig", **TEXT, num_local_experts=4)),
    "olmoe": Model(_of("OlmoeForCausalLM", "OlmoeConfig", **TEXT, num_experts=4, num_experts_per_tok=2)),
    "deepseek3": Model(
        _of(
            "DeepseekV3ForCausalLM", "DeepseekV3Config", **{**TEXT, "num_key_value_heads": 4}, moe_intermediate_size=12,
            n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8,
            q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4, n_group=2, topk_group=1,
        )
    ),
    "granitemoe": Model(_of("GraniteMoeForCausalLM", "GraniteMoeConfig", **TEXT, num_local_experts=4, num_experts_per_tok=2)),
    "gptoss": Model(_of("GptOssForCausalLM", "GptOssConfig", **TEXT, num_local_experts=4, head_dim=8, num_experts_per_tok=2)),
    "gptoss-square": Model(
        _of(
            "GptOssForCausalLM", "GptOssConfig", **{**TEXT, "intermediate_size": 16}, num_local_experts=4, head_dim=8,
            num_experts_per_tok=2,
        )
    ),
    "llama4": Model(_of("Llama4ForCausalLM", "Llama4TextConfig", **TEXT, intermediate_size_mlp=20, num_local_experts=4, head_dim=8)),
    "qwen3vlmoe": Model(
        _of(
            "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
            text_config={
                **TEXT, **EXPERTS, "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
            },
            vision_config={**QWEN_VISION, "deepstack_visual_indexes": [0]},
        ),
        "AutoModelForImageTextToText",
    ),
    "qwen25vl": Model(
        _of(
            "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
            text_config={**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
            vision_config={**QWEN_VISION, "fullatt_block_indexes": [1]}, tie_word_embeddings=False,
        ),
        "AutoModelForImageTextToText",
    ),
    "gemma3": Model(
        _of(
            "Gemma3ForConditionalGeneration", "Gemma3Config", text_config={**TEXT, "head_dim": 8}, vision_config=VISION,
            mm_tokens_per_image=4,
        ),
        "AutoModelForImageTextToText",
    ),
    "llava": Model(_llava, "AutoModelForImageTextToText"),
    "neox": Model(_of("GPTNeoXForCausalLM", "GPTNeoXConfig", **_without("num_key_value_heads"))),
    "vit": Model(_of("ViTForImageClassification", "ViTConfig", **VISION, num_labels=3), "AutoModelForImageClassification"),
    "nomicbert": Model(
        _of("NomicBertModel", "NomicBertConfig", **{**_without("num_key_value_heads"), "pad_token_id": 0}), "AutoModel"
    ),
}  # fmt: skip
MODELS.update(FAMILIES)
