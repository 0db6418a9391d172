"""The maths of each method: arrays in, arrays out, no files.

A tuner is a module with

    PARTS     names of the arrays it needs, in the orientation of the stored weight
    ADDITIVE  whether it is a sum of low-rank products, which the kernel can do
    merge     (weight, step) -> weight, in float64 with an error bound carried along

and a line in `TUNERS`. Laws, which the tests check over every row of `tests/cases.py`: neutral parts
return the same weight; the result lies within its own bound of an exact evaluation.
"""

from __future__ import annotations

from types import ModuleType

from inlay.tuners import dora, lora

TUNERS: dict[str, ModuleType] = {"lora": lora, "dora": dora}
