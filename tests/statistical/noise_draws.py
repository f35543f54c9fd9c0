"""The noise that the compiled, sharded `apply` adds to sums of zeros.

Also a program, one process of a job, which keeps the parts that it holds:

  python -m tests.statistical.noise_draws COUNT NUMBER ADDRESS FILE
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

import dpdist
from dpdist.audit import canaries
from dpdist.distributed import mesh as mesh_lib
from dpdist.keys import keys
from dpdist.mechanism import mechanism
from dpdist.noise import noise
from dpdist.training import step as step_lib

SHAPES = {"a": (80, 128), "b": (80, 128), "c": (128, 80)}
STEPS = 4
# The whole is divided, or each device has a copy.
MESHES = {
  "fsdp": {"data": 1, "fsdp": -1, "model": 1},
  "data": {"data": -1, "fsdp": 1, "model": 1},
}
_ROWS = 8
_SIGMA, _CLIP, _BATCH = 1.5, 0.75, 8
# Of what is drawn here, times this, the standard deviation is 1.
SCALE = _BATCH / (_SIGMA * _CLIP)


def make_step(sizes: dict[str, int]) -> step_lib.Step:
  """A step whose optimizer keeps the noised mean as it comes."""
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=1000,
      expected_batch_size=_BATCH,
      num_steps=10,
      l2_clip_norm=_CLIP,
      target_delta=1e-5,
      noise_multiplier=_SIGMA,
    )
  )
  loss = lambda params, example, rng: (
    0.0 * sum(map(jnp.sum, params.values())) * jnp.sum(example["x"]),
    None,
  )
  return step_lib.Step(
    mechanism.make(plan, loss), canaries.recording(), mesh_lib.make(sizes)
  )


def draw(
  step: step_lib.Step, seed: int, branch: str
) -> list[dict[str, jax.Array]]:
  """The noised means of each step, every other one with no example at all."""
  state = step.init({name: jnp.zeros(shape) for name, shape in SHAPES.items()})
  mine = mesh_lib.local_rows(step.mesh, _ROWS)
  put = lambda x: jax.make_array_from_process_local_data(
    mesh_lib.examples(step.mesh), x[mine], x.shape
  )
  key = mechanism.Streams(keys.insecure_secret(seed), branch).key("noise")
  drawn = []
  for t in range(STEPS):
    accumulator = step.zeros(state.params)
    if t % 2:
      accumulator = step.accumulate(
        state.params,
        accumulator,
        {"x": put(np.ones((_ROWS, 2), np.float32))},
        put(np.zeros(_ROWS, bool)),
        noise.as_key(np.array([0, t], np.uint32)),
        0,
      )
    state, _ = step.apply(state, accumulator, key)
    drawn.append(dict(state.opt_state))
  return drawn


def parts(drawn: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
  """What this process's devices hold, by step, leaf and place in the leaf."""
  found = {}
  for t, mean in enumerate(drawn):
    for name, array in mean.items():
      for shard in array.addressable_shards:
        begin = [part.start or 0 for part in shard.index]
        where = "/".join(map(str, (t, name, *begin)))
        held = np.asarray(shard.data)
        # Where two devices have the same part, they have the same bits.
        np.testing.assert_array_equal(found.setdefault(where, held), held)
  return found


def are_independent(rows: np.ndarray, level: float) -> bool:
  """Whether no two rows [k, n] hang together, nor their squares.

  Of independent normals this is false with probability `level`, about half of
  it for the rows and half for their squares.
  """
  k, n = rows.shape
  largest = stats.norm.isf(level / (k * (k - 1)) / 2) / np.sqrt(n)
  return all(
    np.max(np.abs(np.corrcoef(x) - np.eye(k))) < largest
    for x in (rows, rows**2)
  )


def main() -> None:
  """Draws on every mesh, as one process of a job."""
  count, number, address, path = sys.argv[1:]
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if int(count) > 1:
    jax.distributed.initialize(address, int(count), int(number))
  held = {
    f"{mesh}/{where}": part
    for mesh, sizes in MESHES.items()
    for where, part in parts(draw(make_step(sizes), 1, "")).items()
  }
  np.savez(path, **held)


if __name__ == "__main__":
  main()
