"""Tests of dpdist.data.pipeline."""

import math
import threading

import jax
import numpy as np
import pytest

from dpdist import errors
from dpdist import sampling
from dpdist.data import array_record
from dpdist.data import arrays as arrays_lib
from dpdist.data import pipeline
from dpdist.distributed import mesh as mesh_lib

NUM_EXAMPLES = 40
TIMEOUT = 60  # Seconds; only a broken pipeline ever waits for it.

# The draws of a run with every size that matters to chunks of 4.
DRAWS = [
  [3],
  [],
  [0, 1, 5, 39],
  [2, 4, 6, 8, 10],
  list(range(NUM_EXAMPLES)),
  [],
]


def fixed_sampler(step):
  return np.array(DRAWS[step], np.int64)


def numbered_source():
  """No example is zero in any array, so that padding can be told from data."""
  numbers = np.arange(1, NUM_EXAMPLES + 1)
  return arrays_lib.ArraySource(
    {
      "inputs": np.stack([numbers, numbers * 10], 1).astype(np.float32),
      "targets": numbers.astype(np.int32),
    }
  )


def poisson(seed=0, probability=0.1):
  return sampling.PoissonSampler(
    num_examples=NUM_EXAMPLES, sampling_probability=probability, seed=seed
  )


def run(source=None, sampler=fixed_sampler, **options):
  options = {
    "start_step": 0,
    "num_steps": len(DRAWS),
    "chunk_size": 4,
    "rows": np.arange(options.get("chunk_size", 4)),
  } | options
  return pipeline.steps(source or numbered_source(), sampler, **options)


def ids(chunk):
  """The indices of a chunk's examples, after a look at its padding."""
  numbers = chunk.batch["targets"]
  np.testing.assert_array_equal(numbers == 0, chunk.is_padding_example)
  np.testing.assert_array_equal(chunk.batch["inputs"][:, 0], numbers)
  np.testing.assert_array_equal(chunk.batch["inputs"][:, 1], numbers * 10)
  return (numbers[~chunk.is_padding_example] - 1).tolist()


def assert_same(a, b):
  assert len(a) == len(b)
  for (step_a, chunks_a), (step_b, chunks_b) in zip(a, b, strict=True):
    assert step_a == step_b
    assert len(chunks_a) == len(chunks_b)
    for one, other in zip(chunks_a, chunks_b, strict=True):
      np.testing.assert_array_equal(
        one.is_padding_example, other.is_padding_example
      )
      assert one.batch.keys() == other.batch.keys()
      for name in one.batch:
        np.testing.assert_array_equal(one.batch[name], other.batch[name])


def join_readers():
  """Waits for Grain's threads, which end once their iterator is closed."""
  for thread in threading.enumerate():
    if thread.name.startswith("grain-prefetch"):
      thread.join(TIMEOUT)
      assert not thread.is_alive()


# Layout.


def test_every_draw_is_cut_into_chunks_in_order():
  seen = {step: [ids(chunk) for chunk in chunks] for step, chunks in run()}
  assert seen == {
    step: [draw[i : i + 4] for i in range(0, len(draw), 4)]
    for step, draw in enumerate(DRAWS)
  }
  assert seen[1] == []  # An empty draw: the step is there, without a chunk.
  assert len(seen[4]) == 10


def test_chunks_have_one_shape_and_zeros_for_padding():
  for _, chunks in run():
    for chunk in chunks:
      assert chunk.is_padding_example.dtype == np.bool_
      assert chunk.is_padding_example.shape == (4,)
      assert chunk.batch["inputs"].shape == (4, 2)
      assert chunk.batch["inputs"].dtype == np.float32
      assert chunk.batch["targets"].dtype == np.int32
  _, (_, chunk) = list(run())[3]
  assert chunk.is_padding_example.tolist() == [False, True, True, True]
  assert chunk.batch["inputs"].tolist() == [[11, 110]] + [[0, 0]] * 3


# Hosts.


class Counted:
  """A source of which one knows what was read."""

  def __init__(self, source):
    self._source = source
    self._lock = threading.Lock()
    self.times = np.zeros(len(source), int)

  def __len__(self):
    return len(self._source)

  def read(self, indices):
    with self._lock:
      np.add.at(self.times, indices, 1)
    return self._source.read(indices)


def on_disk(directory):
  """The numbered examples in a file, from which each host reads for itself."""
  path = directory / "train.array_record"
  whole = numbered_source().read(np.arange(NUM_EXAMPLES))
  array_record.write_array_record(
    path,
    [{k: a[i] for k, a in whole.items()} for i in range(NUM_EXAMPLES)],
  )
  return array_record.ArrayRecordSource(path)


def uneven(step):
  """Draws of none, of some, and of more than any chunk here holds."""
  return poisson(step, [0.05, 0.2, 0.7][step % 3])(step)


def assert_hosts_share_the_draw(source, chunk_size, rows, num_steps=30):
  """Reads as each host would; returns how often every row was read."""
  readers = [Counted(source) for _ in rows]
  options = {
    "sampler": uneven,
    "num_steps": num_steps,
    "chunk_size": chunk_size,
  }
  hosts = [
    list(run(reader, rows=mine, **options))
    for reader, mine in zip(readers, rows, strict=True)
  ]
  single = list(run(source, **options))
  drawn = [uneven(step).tolist() for step in range(num_steps)]
  owners = np.bincount(np.concatenate(rows), minlength=chunk_size)
  for step, chunks in single:
    assert [i for chunk in chunks for i in ids(chunk)] == drawn[step]
    for mine, host in zip(rows, hosts, strict=True):
      host_step, part = host[step]
      assert host_step == step
      # Agreed on without a word: also where a host has nothing but padding.
      assert len(part) == len(chunks) == -(-len(drawn[step]) // chunk_size)
      for chunk, whole in zip(part, chunks, strict=True):
        for name, array in whole.batch.items():
          np.testing.assert_array_equal(chunk.batch[name], array[mine])
        np.testing.assert_array_equal(
          chunk.is_padding_example, whole.is_padding_example[mine]
        )
  expected = np.zeros((len(rows), NUM_EXAMPLES), int)
  for draw in drawn:
    for position, example in enumerate(draw):
      for host, mine in enumerate(rows):
        expected[host, example] += position % chunk_size in mine
  # Nothing else was touched, not even once.
  np.testing.assert_array_equal([r.times for r in readers], expected)
  # What makes the above worth while.
  sizes = [len(draw) for draw in drawn]
  assert min(sizes) == 0
  assert max(sizes) > chunk_size
  return owners


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_hosts_read_the_draw_of_one_host_each_example_once(
  num_hosts, interleaved
):
  positions = np.arange(16)
  if interleaved:
    rows = [positions[host::num_hosts] for host in range(num_hosts)]
  else:
    rows = np.array_split(positions, num_hosts)
  owners = assert_hosts_share_the_draw(numbered_source(), 16, rows)
  assert (owners == 1).all()


def test_hosts_read_from_a_file_what_is_theirs(tmp_path):
  rows = np.array_split(np.arange(16), 3)
  owners = assert_hosts_share_the_draw(on_disk(tmp_path), 16, rows)
  assert (owners == 1).all()


@pytest.mark.parametrize(
  ("sizes", "num_hosts", "readers_of_a_row"),
  [
    ((8, 1, 1), 1, 1),
    ((8, 1, 1), 2, 1),
    ((1, 8, 1), 4, 1),
    ((2, 4, 1), 8, 1),
    ((3, 1, 1), 3, 1),
    ((3, 2, 1), 3, 1),
    ((3, 2, 1), 2, 1),
    ((2, 2, 2), 4, 1),
    ((2, 2, 2), 1, 1),
    # Where a model is cut over hosts, each of them needs its examples.
    ((2, 2, 2), 8, 2),
    ((2, 1, 4), 4, 2),
    ((1, 1, 8), 8, 8),
  ],
)
def test_hosts_of_a_mesh_read_the_draw_of_one_host(
  sizes, num_hosts, readers_of_a_row
):
  devices = jax.devices()[: math.prod(sizes)]
  mesh = mesh_lib.make(
    dict(zip(mesh_lib.AXES, sizes, strict=True)), devices=devices
  )
  chunk_size = 12 if 3 in sizes else 8
  rows = [
    mesh_lib.local_rows(mesh, chunk_size, part)
    for part in np.array_split(devices, num_hosts)
  ]
  owners = assert_hosts_share_the_draw(numbered_source(), chunk_size, rows)
  assert (owners == readers_of_a_row).all()


def test_rows_may_be_in_any_order():
  rows = np.array([3, 0, 2])
  (_, (chunk,)), *_ = list(run(start_step=2, num_steps=4, rows=rows))
  assert ids(chunk) == [39, 0, 5]


# Steps.


@pytest.mark.parametrize("start_step", [0, 1, 17, 29, 30])
def test_resumed_stream_is_the_rest_of_the_uninterrupted_one(start_step):
  options = {"sampler": poisson(), "num_steps": 30}
  whole = list(run(**options))
  assert [step for step, _ in whole] == list(range(30))
  assert_same(list(run(**options, start_step=start_step)), whole[start_step:])


@pytest.mark.parametrize(
  ("num_threads", "prefetch"),
  [(0, 0), (0, 4), (4, 0), (1, 1), (2, 4), (8, 3), (8, 64)],
)
def test_threads_and_prefetch_do_not_change_the_content(num_threads, prefetch):
  options = {"sampler": poisson(), "num_steps": 30}
  expected = list(run(**options, num_threads=0))
  read = run(**options, num_threads=num_threads, prefetch=prefetch)
  assert_same(list(read), expected)


def test_steps_come_in_order_though_reads_end_out_of_order():
  later_is_drawn = threading.Event()

  def sampler(step):
    if step == 0:
      assert later_is_drawn.wait(TIMEOUT)
    if step == 1:
      later_is_drawn.set()
    return fixed_sampler(step)

  read = run(sampler=sampler, num_threads=2, prefetch=2)
  assert_same(list(read), list(run(num_threads=0)))


def test_no_more_steps_are_held_than_promised():
  drawn = []
  enough = threading.Semaphore(0)

  def sampler(step):
    drawn.append(step)
    enough.release()
    return fixed_sampler(0)

  iterator = run(sampler=sampler, num_steps=1000, num_threads=2, prefetch=3)
  next(iterator)
  for _ in range(4):
    assert enough.acquire(timeout=TIMEOUT)
  # A right pipeline never gets here a fifth, however long this waits.
  assert not enough.acquire(timeout=0.1)
  iterator.close()
  join_readers()
  assert sorted(drawn) == [0, 1, 2, 3]


@pytest.mark.parametrize("drop", ["close", "delete"])
def test_closing_cancels_what_has_not_begun_and_ends_the_threads(drop):
  drawn = []
  closed = threading.Event()

  def sampler(step):
    drawn.append(step)
    if step > 0:
      assert closed.wait(TIMEOUT)
    return fixed_sampler(0)

  iterator = run(sampler=sampler, num_steps=1000, num_threads=1, prefetch=8)
  assert next(iterator)[0] == 0
  if drop == "close":
    iterator.close()
  del iterator
  closed.set()
  join_readers()
  assert drawn in ([0], [0, 1])


def test_an_iterator_that_is_never_used_draws_nothing():
  def sampler(step):
    raise AssertionError(step)

  run(sampler=sampler)


# Errors.


class FailingSource(arrays_lib.ArraySource):
  """Raises when it is asked for example 2, that is in step 3."""

  def __init__(self, error):
    super().__init__({"targets": np.arange(NUM_EXAMPLES)})
    self._error = error

  def read(self, indices):
    if len(indices) and indices[0] == 2:
      raise self._error
    return super().read(indices)


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_errors_of_the_source_surface_at_their_step(num_threads):
  iterator = run(FailingSource(OSError("disk gone")), num_threads=num_threads)
  assert [next(iterator)[0] for _ in range(3)] == [0, 1, 2]
  with pytest.raises(OSError, match="disk gone"):
    next(iterator)
  # It is over then: going on would leave a step out.
  assert list(iterator) == []
  join_readers()


def test_a_source_that_cannot_be_read_is_named_with_its_step():
  iterator = run(FailingSource(errors.ReadError("data set 'x' is gone")))
  for _ in range(3):
    next(iterator)
  with pytest.raises(errors.ReadError) as caught:
    next(iterator)
  assert str(caught.value) == "step 3: data set 'x' is gone"


@pytest.mark.parametrize("num_threads", [0, 2])
def test_stop_iteration_of_a_source_does_not_end_the_run(num_threads):
  iterator = run(FailingSource(StopIteration()), num_threads=num_threads)
  with pytest.raises(RuntimeError):
    list(iterator)


@pytest.mark.parametrize(
  "draw",
  [
    np.array([3, 3]),
    np.array([4, 3]),
    np.array([-1, 3]),
    np.array([3, NUM_EXAMPLES]),
    np.array([3.0, 4.0]),
    np.array([[3, 4]]),
    [3, 4],
    None,
  ],
  ids=[
    "twice",
    "unsorted",
    "negative",
    "beyond",
    "float",
    "2d",
    "list",
    "none",
  ],
)
def test_a_bad_draw_is_refused(draw):
  with pytest.raises(ValueError, match="its draw for step 5 is not") as caught:
    next(run(sampler=lambda step: draw, start_step=5))
  assert "3" not in str(caught.value)  # Which examples are drawn is private.


@pytest.mark.parametrize("surplus", [-1, 1])
def test_a_source_that_returns_other_than_asked_is_refused(surplus):
  class Wrong(arrays_lib.ArraySource):
    def read(self, indices):
      size = len(indices) + surplus
      return {"targets": np.ones(size), "inputs": np.ones((size, 2))}

  source = Wrong({"targets": np.arange(NUM_EXAMPLES)})
  with pytest.raises(ValueError, match="one row of 'targets' for each index"):
    next(run(source, start_step=3))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"start_step": -1}, "start_step must be"),
    ({"start_step": 7}, "start_step must be"),
    ({"chunk_size": 0}, "chunk_size must be"),
    ({"rows": np.array([0, 4])}, "rows must be"),
    ({"rows": np.array([-1, 0])}, "rows must be"),
    ({"rows": np.array([1, 1])}, "rows must be"),
    ({"rows": np.array([0.0, 1.0])}, "rows must be"),
    ({"rows": np.array([[0, 1]])}, "rows must be"),
    ({"num_threads": -1}, "num_threads must be"),
    ({"prefetch": -1}, "prefetch must be"),
  ],
)
def test_bad_arguments_are_refused_on_the_call(options, message):
  with pytest.raises(ValueError, match=message):
    run(**options)


@pytest.mark.parametrize(("drawn", "size"), [(0, 4), (3, 4), (4, 4), (5, 8)])
def test_a_draw_is_padded_and_never_cut(drawn, size):
  rows, is_padding = pipeline.padded(np.arange(1, drawn + 1), 4)
  assert len(rows) == len(is_padding) == size
  np.testing.assert_array_equal(rows[~is_padding], np.arange(1, drawn + 1))
