"""Training: a recipe, and what it leaves behind.

    recipe ─► targets ─► sft ─► checkpoints

recipe      arguments and their defaults, checked before anything is loaded
data        the rows of the datasets
examples    rows → tokens, with labels on answers only
packing     several examples in one block
load        model and tokenizer, ready for training
codes       bases that are stored in codes
anatomy     the modules of a model: what they are, where they belong, what they do
names       dotted names, and the ends of them that PEFT lists
targets     presets such as all-linear, as names of the model's own modules
tuners      the recipe as PEFT's config for each method
converting  PiSSA and OLoRA as a LoRA on the original base
adalora     what a run of AdaLoRA needs to go on
schedule    the number of steps, and the recipe in the words of transformers
stop        Ctrl-C that loses nothing
loop        the steps, and what is saved and logged at which of them
sft         the run
records     args.json, logging.jsonl, curves, best and last, the fingerprint of the base
launch      several processes on one machine

The loop itself is transformers' Trainer, the methods are PEFT's.
"""
