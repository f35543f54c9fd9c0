"""Eight devices for every test, on any machine.

Many privacy bugs of sharded programs cannot be seen on one device, so tests
fail, and are never skipped, where there are fewer.
"""

from collections.abc import Iterator
import os
import shutil
import signal
import tempfile

_DEVICES = 8
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + f" --xla_force_host_platform_device_count={_DEVICES}"
  # On a busy machine one device may be that far behind the others.
  + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# As many threads in every process that a test starts, whatever its devices.
os.environ.setdefault("NPROC", str(max(_DEVICES, os.cpu_count() or 1)))

# As in a terminal, also under nohup or in a script's background: a signal that
# is ignored here would be ignored by the processes that tests start and signal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A program that one test, worker or started process has compiled, no other one
# of this run compiles again.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made_cache = ""
if _CACHE not in os.environ:
  _made_cache = tempfile.mkdtemp(prefix="dpdist-compiled-")
  os.environ[_CACHE] = _made_cache
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import jax  # noqa: E402
import pytest  # noqa: E402

from tests import parts  # noqa: E402

_LONG = ("cluster", "slow", "tpu")
_QUICK = "quick_compiles"
_OPTION = "jax_disable_most_optimizations"
_compiled_quickly: list[bool] = []


def pytest_addoption(parser: pytest.Parser) -> None:
  """Adds the option that chooses among tests that take long."""
  parser.addoption(
    "--part",
    choices=parts.CHOICES,
    default="all",
    help="of the cluster, slow and tpu tests, a quarter",
  )


def pytest_collection_modifyitems(
  config: pytest.Config, items: list[pytest.Item]
) -> None:
  """Leaves out the tests that take long of other parts."""
  # Together, so that few programs are compiled both ways.
  items.sort(key=_is_quick)
  which = parts.number(config.getoption("part"), config.rootpath)
  if which is None:
    return
  # All cases of a function together: they share what they set up.
  function = lambda item: item.nodeid.partition("[")[0]
  is_long = lambda item: any(map(item.get_closest_marker, _LONG))
  long = [item for item in items if is_long(item)]
  mine = {*parts.of(sorted({*map(function, long)}), which)}
  left_out = {item for item in long if function(item) not in mine}
  items[:] = [item for item in items if item not in left_out]
  config.hook.pytest_deselected(items=[*left_out])


def _is_quick(node: pytest.Item | pytest.Collector) -> bool:
  marks = node.iter_markers("usefixtures")
  return any(_QUICK in mark.args for mark in marks)


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
  """Leaves out most of what XLA does to make programs fast.

  For files that test the life of a run, models or the order of things. Those
  that test the floating point of a compiled program test the one that users
  run, and have none of this.
  """
  jax.config.update(_OPTION, True)
  # Processes that a test starts go on with a run of this one, so they must
  # round as it does.
  os.environ[_OPTION.upper()] = "1"
  yield
  del os.environ[_OPTION.upper()]
  jax.config.update(_OPTION, False)
  _compiled_quickly.append(True)


@pytest.fixture(scope="module", autouse=True)
def _compiled_as_meant(request: pytest.FixtureRequest) -> None:
  # JAX does not look at the option where it holds a compiled program already.
  if _compiled_quickly and not _is_quick(request.node):
    jax.clear_caches()
    _compiled_quickly.clear()


def pytest_unconfigure() -> None:
  """Removes the compiled programs, in the process that made their folder."""
  if _made_cache:
    shutil.rmtree(_made_cache, ignore_errors=True)


def pytest_sessionstart() -> None:
  """Stops at once where the devices could not be had."""
  if jax.device_count() != _DEVICES:
    raise RuntimeError(
      f"the tests need {_DEVICES} devices, found {jax.device_count()}"
    )
