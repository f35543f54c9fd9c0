"""The rules of this project: a folder is a package, a target is a line or two."""

load("@rules_python//python:defs.bzl", "py_binary", "py_library", "py_test")

_TESTS = ["//tests:__subpackages__"]

# What every layer may use.
_BASE = ["//dpdist:base"]

def _folder():
    return native.package_name().rpartition("/")[2]

def dp_package(deps = [], visibility = ["//visibility:public"]):
    """Declares the library of all modules of a folder, under the folder's name.

    Args:
      deps: what they import from other packages, but for //dpdist:base.
      visibility: who may import them.
    """
    py_library(
        name = _folder(),
        srcs = native.glob(["*.py"]),
        visibility = visibility,
        deps = deps + _BASE,
    )

def dp_commands(names):
    """Declares the programs among the modules of a folder.

    Args:
      names: of the modules.
    """
    for name in names:
        py_binary(
            name = name,
            srcs = [name + ".py"],
            visibility = ["//visibility:public"],
            deps = [":" + _folder()],
        )

def dp_tests(deps = [], small = [], local = [], data = []):
    """Declares a test for each file of the folder that ends in _test.py.

    The other modules of the folder are a library under the folder's name.

    Args:
      deps: what all those files import, but for //dpdist:base,
        //tests:conftest and //tests/support, which are added.
      small: names of the tests that take seconds; the others are large.
      local: names of the tests that want the tree itself and no sandbox.
      data: what they start as programs.
    """
    deps = deps + _BASE + ["//tests:conftest", "//tests/support"]
    py_library(
        name = _folder(),
        srcs = native.glob(["*.py"], exclude = ["*_test.py"]),
        visibility = _TESTS,
        deps = deps,
    )
    for file in native.glob(["*_test.py"]):
        name = file[:-len(".py")]
        py_test(
            name = name,
            size = "small" if name in small else "large",
            srcs = [
                file,
                "//tests/support:run.py",
            ],
            args = ["%s/%s" % (native.package_name(), file)],
            data = data,
            main = "//tests/support:run.py",
            tags = ["external", "no-sandbox"] if name in local else [],
            deps = deps + [":" + _folder()],
        )
