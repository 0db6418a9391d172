"""Stored forms of quantised weights: arrays in, arrays out, no files.

A codec is a file of functions. A quantised weight is stored as a few tensors, its *parts* (codes, scales, zero
points …); the codec knows their names, how a weight (out, in) is read from them row block by row block, and how
it is written into them.

    METHODS     values of `quant_method` in `quantization_config` that it may serve
    PARTS       part -> suffix of its key after the stem; the first are the codes, by which a module of this form
                is known
    OPTIONAL    the same for parts that may be absent
    CODES       types that the codes may have
    NAME_SUFFIX what follows the stem in the key of the weight: .weight where the stem is a module
    EXTRAS      endings of other keys that serve such weights alone: scales of activations and of the cache
    settings(config, module, found, read) -> settings, or ValueError
                all that decoding needs, as JSON values: "shape" is that of the weight, (out, in, …). `config` is
                `quantization_config`; `found` maps a part to its (dtype name, shape); `read(part)` reads a small
                one whole. ValueError says what contradicts what.
    layout(settings) -> {part: (dtype name, shape)}
                the parts that a weight with these settings has. Law: equal to `found` of what was read.
    spans(settings, first, last) -> {part: (axis, begin, end) or None}
                what of each part the rows [first, last) of the weight's matrix need: a range of an axis, or all of it
    decode(parts, settings, first, last) -> float32, (last - first, in)
                those rows; `parts` are the slices that `spans` names, as stored bits (numpy, 16-bit floats and
                8-bit floats as unsigned integers)
    by_kernel(settings) -> bool
    decode_into(parts, settings, first, last, out)
                both or neither: whether a compiled kernel decodes such weights, and `decode` by it, into `out`
    align(settings) -> int
                rows that must be encoded together (blocks of rows begin at a multiple of it)
    measure(weight, settings) -> array           where something of the whole tensor must be known before codes are
                                                 chosen: the elementwise maximum over all blocks goes to `encode`
    encode(weight, settings, first, known) -> {part: slice}
                rows of float32 that begin at `first`, encoded: slices as in `spans`. `known` has the parts that are
                kept (stored scales and zero points of these rows, as stored bits), and "measured". A scale that is
                not known is rounded to its stored type first, then the codes are chosen with it.
    OFFSET, shifted_together(settings) -> int    where a part of floats shifts all values of a group by the same: its
                                                 name, and the columns in a group (0: they lie in several rows). With
                                                 all parts known but this, `encode` gives it alone
    finish(parts, settings) -> {part: whole}     where parts of all blocks together are stored in another form
    UNFINISHED  those of them that look like what is stored, and are not, until then
    fresh(shape, options) -> settings            settings of a new weight of this form, or ValueError
    config(settings, excluded) -> quantization_config of a checkpoint of such weights

The arithmetic of `decode` is the format's own formula in float32, each value rounded once. Laws, which the tests
check over the whole table: `encode(decode(parts))` with the stored scales gives the same codes where the form has one
code a value; with new scales a value errs by at most half a step, but for the largest ones of a group whose scale
is rounded; blocks may be cut anywhere (`decode`) or at multiples of `align` (`encode`); equal to the library that
owns the format.
"""
