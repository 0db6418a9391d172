"""Try an adapter: generation on base + adapters, and the proof that the merged model behaves like them.

Source ── open_backend ──► Backend ── generate, stream, vectors ──► Reply
          pt, vllm         (backend.py: the protocol and the table)

growing     a reply while its tokens come (detokenise: text from tokens)
loading     the model of a plan, its tensors merged while they are loaded
description config, class and tokenizer of a plan's result
live        base + adapters unmerged, through PEFT
chat        messages → tokens, and a conversation in the terminal
batch       a dataset → results, appended as they come
serve       an OpenAI-compatible endpoint (its bodies: openai_api)
behaviour   base, base + adapters and merged on the same prompts, with a measured tolerance
            (rounding, distance, verdict)
vllm        the engine in processes of its own (vllm_prepare: what it is started with; vllm_serve: its own server)
vllm_loader merged tensors as a load format of vLLM's; folder is the model directory that it then sees
cache       merged directories for engines that read files
"""
