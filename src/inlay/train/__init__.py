"""Training: a recipe, and what it leaves behind.

    recipe ─► targets ─► sft ─► checkpoints

recipe      arguments and their defaults, checked before anything is loaded
targets     presets such as all-linear, as names of the model's own modules
tuners      the recipe as PEFT's config for each method
examples    rows → tokens, with labels on answers only
load        model and tokenizer, ready for training
sft         the run
records     args.json, logging.jsonl, curves, best and last, the fingerprint of the base

The loop itself is transformers' Trainer, the methods are PEFT's.
"""
