"""The Python rules that this Bazel carries itself, under their modern name."""

py_binary = native.py_binary
py_library = native.py_library
py_test = native.py_test
