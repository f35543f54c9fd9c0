"""One rule for all tests of a folder."""

load("@rules_python//python:defs.bzl", "py_test")

def dp_tests(deps, small = [], local = [], data = []):
    """Declares a test for each file of the folder that ends in _test.py.

    Args:
      deps: what those files import.
      small: names of the tests that take seconds; the others are large.
      local: names of the tests that want the tree itself and no sandbox.
      data: what they start as programs.
    """
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
            deps = deps,
        )
