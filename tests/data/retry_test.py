"""Sources in trouble: files that go away and come back, and pipes."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dpdist import errors
from dpdist.data import arrays as arrays_lib
from dpdist.data import retry as retry_lib

NUM_EXAMPLES = 12
FOREVER = 3600  # Seconds; nothing that is right ever waits for it.
TIMEOUT = 60


class Files:
  """Examples in files of their own, opened anew by each read."""

  def __init__(self, directory):
    self.directory = directory
    self._lock = threading.Lock()
    self.attempts = 0
    for i in range(NUM_EXAMPLES):
      self.path(i).write_text(str(i * i))

  def path(self, index):
    return self.directory / f"example-{index}"

  def __len__(self):
    return NUM_EXAMPLES

  def read(self, indices):
    with self._lock:
      self.attempts += 1
    found = [int(self.path(i).read_text()) for i in indices]
    return {"targets": np.array(found)}

  def content_digest(self):
    return self.path(0).read_text()


@pytest.fixture
def files(tmp_path):
  return Files(tmp_path)


def waiting(source, *, tell=None, retry=FOREVER, stall=0):
  def unexpected(line):
    raise AssertionError(line)

  return retry_lib.RetryingSource(
    source,
    name="data set 'x'",
    retry_seconds=retry,
    stall_seconds=stall,
    tell=tell or unexpected,
  )


def squares(source, indices):
  return source.read(np.array(indices))["targets"].tolist()


def in_threads(number, work):
  """Starts threads that put what they return, or raise, into a list."""
  results = []

  def collect():
    try:
      results.append(work())
    except Exception as error:
      results.append(error)

  threads = [threading.Thread(target=collect) for _ in range(number)]
  for thread in threads:
    thread.start()
  return threads, results


def join(threads):
  for thread in threads:
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_without_trouble_it_is_the_source(files):
  source = waiting(files, retry=0)
  assert len(source) == NUM_EXAMPLES
  assert source.content_digest() == "0"
  assert squares(source, [3, 5]) == [9, 25]
  assert files.attempts == 1


def test_what_is_away_is_waited_for_and_then_read_whole(files, tmp_path):
  told = []

  def come_back(line):
    told.append(line)
    (tmp_path / "away").rename(files.path(5))

  files.path(5).rename(tmp_path / "away")
  assert squares(waiting(files, tell=come_back), [3, 5, 7]) == [9, 25, 49]
  assert files.attempts == 2
  (line,) = told
  assert line == (
    "data set 'x' cannot be read (No such file or directory); it is waited for,"
    " up to 3600 s"
  )


def test_the_manifest_is_waited_for_too(files, tmp_path):
  files.path(0).rename(tmp_path / "away")
  source = waiting(
    files, tell=lambda line: (tmp_path / "away").rename(files.path(0))
  )
  assert source.content_digest() == "0"


def test_changed_files_are_waited_for_and_passed_on(tmp_path):
  np.save(tmp_path / "y.npy", np.arange(3))
  mapped = np.load(tmp_path / "y.npy", mmap_mode="r")
  told = []

  def back(line):
    told.append(line)
    (tmp_path / "away").rename(tmp_path / "y.npy")

  source = waiting(arrays_lib.ArraySource({"inputs": mapped}), tell=back)
  assert source.changed_files() == []
  (tmp_path / "y.npy").rename(tmp_path / "away")
  assert source.changed_files() == []
  assert len(told) == 1
  os.utime(tmp_path / "y.npy", ns=(0, 0))
  assert source.changed_files() == [str(tmp_path / "y.npy")]
  assert source.earlier_digests() == []


def test_patience_ends_with_what_to_do_and_names_no_example(files):
  told = []
  files.path(5).unlink()
  with pytest.raises(errors.ReadError) as caught:
    squares(waiting(files, tell=told.append, retry=0.25), [3, 5])
  # At once, and after 0.1 s and 0.15 s more.
  assert files.attempts == 3
  assert len(told) == 1
  message = str(caught.value)
  assert message.startswith(
    "data set 'x' cannot be read (No such file or directory), and was waited"
    " for 0.25 s: see that all of it can be read, and run the same command"
  )
  assert "example-5" not in message
  # Not in what a traceback would show either.
  assert caught.value.__cause__ is caught.value.__context__ is None


def test_without_patience_the_first_failure_is_the_last(files):
  files.path(5).unlink()
  with pytest.raises(errors.ReadError, match="was waited for 0 s"):
    squares(waiting(files, retry=0), [5])
  assert files.attempts == 1


def test_other_threads_in_trouble_are_not_told_of_but_the_next_outage_is(
  files, tmp_path
):
  told = []
  source = waiting(files, tell=told.append)
  for outage in (1, 2):
    before = files.attempts
    all_tried = threading.Event()

    def work():
      return squares(source, [5])

    files.path(5).rename(tmp_path / "away")
    threads, results = in_threads(4, work)
    while files.attempts < before + 8:
      all_tried.wait(0.01)
    (tmp_path / "away").rename(files.path(5))
    join(threads)
    assert results == [[25]] * 4
    assert len(told) == outage


@pytest.fixture
def pipe(files):
  """Makes an example of a pipe: its read ends when somebody has written."""

  class Pipe:
    def write(self, text):
      # For reading too, so that it does not wait for who may have given up.
      descriptor = os.open(files.path(5), os.O_RDWR)
      os.write(descriptor, text.encode())
      os.close(descriptor)

  files.path(5).unlink()
  os.mkfifo(files.path(5))
  return Pipe()


def test_a_slow_read_is_told_of_and_its_answer_taken(files, pipe):
  told = []

  def answer(line):
    told.append(line)
    pipe.write("25")

  source = waiting(files, tell=answer, stall=0.2)
  assert squares(source, [3, 5]) == [9, 25]
  assert files.attempts == 1
  assert told == [
    "data set 'x' has not answered for 0.2 s; it is waited for, up to 3600 s"
  ]


def test_a_read_that_does_not_come_back_is_given_up(files, pipe):
  told = []
  source = waiting(files, tell=told.append, retry=0.3, stall=0.2)
  with pytest.raises(errors.ReadError) as caught:
    squares(source, [3, 5])
  assert len(told) == 1
  assert "has not answered for 0.2 s, and was waited for 0.3 s" in str(
    caught.value
  )
  pipe.write("25")  # Lets the thread go.


_READ_SLOWLY = """
import sys
import numpy as np
from dpdist.data import retry as retrying
class Pipe:
  def read(self, indices):
    print("reading", flush=True)
    with open(sys.argv[1]) as file:
      return {"targets": np.array([int(file.read())])}
source = retrying.RetryingSource(
  Pipe(), name="x", retry_seconds=0, stall_seconds=5, tell=print
)
print(source.read(np.array([5]))["targets"])
"""


@pytest.mark.slow
def test_a_process_that_was_stopped_has_lost_no_patience(files, pipe):
  child = subprocess.Popen(
    [sys.executable, "-c", _READ_SLOWLY, str(files.path(5))],
    cwd=pathlib.Path(__file__).parents[2],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == "reading\n"
  time.sleep(0.5)  # So that its clock runs.
  child.send_signal(signal.SIGSTOP)
  time.sleep(6)  # Longer than it would wait.
  child.send_signal(signal.SIGCONT)
  time.sleep(0.5)  # It looks before there is an answer.
  pipe.write("25")
  out, _ = child.communicate(timeout=TIMEOUT)
  assert out == "[25]\n"


def test_silence_without_a_limit_is_not_trouble(files, pipe):
  threads, results = in_threads(1, lambda: squares(waiting(files), [5]))
  threads[0].join(0.5)
  assert threads[0].is_alive()
  pipe.write("25")
  join(threads)
  assert results == [[25]]


def test_closing_ends_the_waiting(files, pipe):
  files.path(7).unlink()
  told = threading.Event()
  source = waiting(files, tell=lambda line: told.set(), stall=FOREVER)
  silent, results = in_threads(1, lambda: squares(source, [5]))
  failing, more = in_threads(1, lambda: squares(source, [7]))
  assert told.wait(TIMEOUT)
  source.close()
  join(silent + failing)
  for error in results + more:
    assert isinstance(error, errors.ReadError)
  pipe.write("25")


def test_a_broken_contract_is_not_tried_again(files):
  files.path(5).write_text("twenty-five")
  with pytest.raises(errors.ReadError, match=r"^data set 'x' cannot be read: "):
    squares(waiting(files), [5])
  assert files.attempts == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_only_reads_that_touch_a_file_have_threads(tmp_path, in_memory):
  np.save(tmp_path / "x.npy", np.arange(NUM_EXAMPLES))
  threads = []

  def convert(batch):
    threads.append(threading.current_thread())
    return batch

  array = np.load(tmp_path / "x.npy", mmap_mode=None if in_memory else "r")
  source = waiting(
    arrays_lib.ArraySource({"x": array}, convert=convert), stall=FOREVER
  )
  assert source.read(np.array([3]))["x"].tolist() == [3]
  assert (threads == [threading.current_thread()]) == in_memory


def test_other_errors_come_through(files):
  class Odd(Files):
    def read(self, indices):
      raise KeyError("odd")

  with pytest.raises(KeyError, match="odd"):
    squares(waiting(Odd(files.directory)), [5])


def test_delays_are_the_same_in_every_run():
  delays = list(itertools.islice(retry_lib._delays(), 10))
  assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]
  assert delays == list(itertools.islice(retry_lib._delays(), 10))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"retry": -1}, r"data.retry_seconds must be .* -1"),
    ({"retry": float("inf")}, r"data.retry_seconds must be .* inf"),
    ({"stall": float("nan")}, r"data.stall_seconds must be .* nan"),
  ],
)
def test_bad_settings_are_named(files, changes, message):
  with pytest.raises(ValueError, match=message):
    waiting(files, **changes)
