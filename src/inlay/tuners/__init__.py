"""The maths of each method: arrays in, arrays out, no files.

`lora` and `dora` work on low-rank pairs in the orientation of the stored weight, with an error bound carried
along; what they leave open is decided exactly. Every other method is a file that `dense` lists, with

    REQUIRED, OPTIONAL   names of its parts, as PEFT spells them in keys
    SHARED               parts that stand once in a file, for all modules
    FIELDS, IGNORED      fields of the config that change the merged weight, and that do not
    REFUSED              fields that cannot be merged when set -> why, and what to do
    WHOLE                whether a row of the result needs other rows of the weight
    ADDITIVE             whether it is a delta that does not depend on the weight
    settings(raw, rank, alpha)                what the formula needs, as JSON values
    check(shapes, settings, shape)            what does not fit a weight (out, in, …), or None
    prepare(parts, settings, shape)           done once a tensor
    delta(parts, settings, shape, first, last)              rows of the delta, if additive;
    merge(weight, base, parts, settings, shape, first)      otherwise merged rows

and, where it needs them,

    touches_bias, merge_bias                  where it acts on the layer's bias too
    NEEDS_BIAS                                whether it is an error that the layer has none
    reads_weight(parts), BASE_WEIGHT          whether the bias takes the layer's weight as a part, and its name
    DRAWN, drawn_shapes(settings)             whether SHARED may be drawn again, and its shapes by `largest`
    LISTED_IN                                 a field of the config that names modules, for `settings["listed"]`
    PLACES, misplaced(places, shapes, shape)  parts that are indices, and what is wrong with their numbers, or None
    remark(raw)                               what a reader of the plan should know of such a config, or None

in float64; `base` is the weight before any adapter. Laws, which the tests check over every row of their tables:
neutral parts return the same weight; rows do not depend on how they are cut into blocks; equal to PEFT in
float64, or to the paper's formula where PEFT computes in less.
"""
