"""The one part of the package that is compiled, where there is a compiler; all else is in pyproject.toml."""

import os

from setuptools import Extension, setup

# Optional: without a compiler, or with S4V_NATIVE=0, Python reads what it would have read.
native = Extension(
    "s4v.store._native",
    ["store/_native.c"],
    depends=["store/_crc32c.h"],
    py_limited_api=True,
    optional=True,
    extra_compile_args=["-O3"],
)
is_wanted = os.environ.get("S4V_NATIVE") != "0"
setup(
    script_name="setup.py",  # a module of the root package else, for that is the root
    ext_modules=[native] if is_wanted else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if is_wanted else {},
)
