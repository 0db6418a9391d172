"""The compiled kernels: built where a C compiler is there, left out where it is not.

The numpy paths give the same bytes without them, more slowly.
"""

import sys

from setuptools import Extension, setup

FLAGS = [] if sys.platform == "win32" else ["-O3", "-fno-math-errno", "-Wno-psabi"]
# A product and a sum that the formats round one after the other must not become one instruction.
SEPARATE = [] if sys.platform == "win32" else ["-ffp-contract=off"]


def kernel(name: str, *flags: str) -> Extension:
    return Extension(
        f"inlay.{name}",
        [f"src/inlay/{name.replace('.', '/')}.c"],
        extra_compile_args=[*FLAGS, *flags],
        py_limited_api=True,
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        optional=True,
    )


setup(ext_modules=[kernel("tuners._kernel"), kernel("codecs._decode", *SEPARATE)])
