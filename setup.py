"""The compiled kernel: built where a C compiler is there, left out where it is not.

The float64 path gives the same bytes without it, more slowly.
"""

import sys

from setuptools import Extension, setup

FLAGS = [] if sys.platform == "win32" else ["-O3", "-fno-math-errno", "-Wno-psabi"]

setup(
    ext_modules=[
        Extension(
            "inlay.tuners._kernel",
            ["src/inlay/tuners/_kernel.c"],
            extra_compile_args=FLAGS,
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            optional=True,
        )
    ]
)
