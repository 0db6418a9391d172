"""Quantising with calibration: codes chosen so that what a layer computes on real text changes least.

    quantise.quantise(source, output, "awq" | "gptq")   an ordinary 16-bit checkpoint -> a quantised one, checked
    perplexity.perplexity(directory, texts)             of any checkpoint that `inlay` reads, quantised or not

    calibration     texts, and the blocks of tokens made of them
    skeleton        the model's class without weights; those of one layer come and go
    activations     what flows between the layers, and how the decoder calls each
    choice          which weights are quantised
    tracing         which matrices read the same channels, by watching one forward
    folding         which gain or which rows can take a scale over, proved on the layer itself
    observing       what the matrices of a layer read on the calibration texts
    search          the scale of each channel and the bounds of each group (AWQ)
    awq, gptq       a method each
    writing         shards in the layout of the source, and the files beside them
    quantise        staging, method, check

Needs the extra `inlay[quant]`, and `inlay[gptq]` for GPTQ; torch and transformers are imported on use.
"""
