"""What pyproject.toml cannot say: the extensions and the tag of the wheel."""

import sysconfig

from setuptools import Extension, setup

# All is compiled against the limited API of Python 3.11, so that one wheel serves
# all later versions; the free-threaded build has no such API yet.
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=[
        "aioummu/_abi_build.py:ffibuilder",
        "aioummu/_engine_build.py:ffibuilder",
    ],
    ext_modules=[
        Extension(
            "aioummu._hits", ["aioummu/_hits.c"], py_limited_api=not free_threaded
        )
    ],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
