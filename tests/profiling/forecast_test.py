"""Programs for pods of TPUs, compiled without one, and what they do.

Most needs libtpu, and no TPU: python -m pytest -m tpu
"""

import json
import os
import subprocess
import sys

import pytest

from dpdist import config as config_lib
from dpdist.profiling import forecast
from dpdist.profiling import roofline
from dpdist.training import abstract_step
from dpdist.training import setup

_LARGE = (
  # What must fit: a 1B decoder, as published, and an 8B one.
  ("decoder_1b", ("--topology=v6e:16x16", "--num_slices=8"), 2048, 16),
  ("decoder_8b", ("--topology=v5p:8x8x8",), 512, 64),
)
# Small, but with sizes that TPUs like.
_SMALL = (
  "--config=configs/decoder.py",
  "--topology=v5e:2x2",
  "--config.data.sequence_length=128",
  "--config.model.name=stacked_decoder",
  "--config.model.depth=3",
  "--config.model.width=256",
  "--config.model.num_outputs=1024",
  "--config.chunk_size=16",
)


def _bench(*args, code=0):
  # In a process of its own: libtpu would take this one over.
  run = subprocess.run(
    [sys.executable, "-m", "launch.bench", "--json", *args],
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == code, run.stderr
  return json.loads(run.stdout)


def _kinds(program, **wanted):
  return [
    x
    for x in program["collectives"]
    if all(x[name] == value for name, value in wanted.items())
  ]


@pytest.mark.tpu
def test_data_parallel_reduces_once_and_noise_sends_nothing():
  facts = _bench(*_SMALL)
  assert facts["accumulate"]["collectives"] == []
  # All of the gradient, and nothing else: so noise is drawn where it is used.
  (reduction,) = facts["apply"]["collectives"]
  assert reduction["kind"] == "all-reduce"
  assert reduction["group_size"] == 4
  # Two floats a number: multiples of a unit, which add up exactly, and rests.
  assert reduction["num_bytes"] == pytest.approx(
    2 * 4 * facts["parameters"], rel=0.01
  )
  assert facts["memory"]["parameters"] == 4 * facts["parameters"]


@pytest.mark.tpu
def test_fsdp_gathers_by_block_and_scatters_sums():
  facts = _bench(*_SMALL, "--config.mesh.fsdp=4")
  whole = 4 * facts["parameters"]
  assert facts["memory"]["parameters"] == pytest.approx(whole / 4, rel=0.01)
  assert facts["memory"]["optimizer"] == pytest.approx(whole / 2, rel=0.01)
  # Two floats a number.
  assert facts["memory"]["accumulator"] == pytest.approx(whole / 2, rel=0.01)
  accumulate, apply = facts["accumulate"], facts["apply"]
  # Seven weights of a block, forward and backward in each of two passes.
  gathers = _kinds(accumulate, kind="all-gather", num_runs=3)
  large = [x for x in gathers if x["num_bytes"] >= 256 * 256 * 2]
  assert len(large) == 7 * 4
  stack = max(x["num_bytes"] for x in gathers)
  assert stack <= 256 * 1024 * 4
  # The sums of a block's weights, once; XLA reduces small ones whole.
  scatters = _kinds(accumulate, kind="reduce-scatter", num_runs=3)
  assert [x["num_bytes"] for x in scatters] == [256 * 1024 * 4] * 3
  # For the released norm, a number.
  assert sum(x["num_bytes"] for x in apply["collectives"]) < 1000


@pytest.mark.tpu
@pytest.mark.parametrize(("config", "args", "num_chips", "fsdp"), _LARGE)
def test_large_decoders_fit(config, args, num_chips, fsdp):
  facts = _bench(f"--config=configs/{config}.py", *args)
  assert facts["fits"] is True
  assert facts["num_chips"] == num_chips
  memory = facts["memory"]
  assert memory["peak"] < 0.9 * memory["capacity"]
  per_chip = 4 * facts["parameters"] / fsdp
  assert memory["parameters"] == pytest.approx(per_chip, rel=0.01)
  assert memory["optimizer"] == pytest.approx(2 * per_chip, rel=0.01)
  depth = 26 if config == "decoder_1b" else 32
  looped = lambda kind: _kinds(facts["accumulate"], kind=kind, num_runs=depth)
  assert len(looped("all-gather")) == 7 * 4
  if config == "decoder_8b":
    assert len(looped("reduce-scatter")) == 7


@pytest.mark.tpu
def test_what_does_not_fit_is_told():
  facts = _bench(
    "--config=configs/decoder_8b.py",
    "--topology=v5e:2x2",
    "--config.mesh.fsdp=1",
    "--config.chunk_size=4",
    "--config.clipping.microbatch_size=1",
    code=1,
  )
  assert facts["fits"] is False
  assert "hbm" in facts["reason"].lower()


@pytest.mark.parametrize(
  ("topology", "num_slices", "message"),
  [
    ("v9:2x2", 1, "topology must be one of .* got 'v9:2x2'"),
    ("v6e", 1, "topology must be one of .* got 'v6e'"),
    ("v6e:2by2", 1, "topology must be one of .* got 'v6e:2by2'"),
    ("v6e:2x2", 0, "num_slices must be an integer >= 1, got 0"),
  ],
)
def test_topologies_that_cannot_be_are_refused(topology, num_slices, message):
  with pytest.raises(ValueError, match=message):
    roofline.devices(topology, num_slices)


def test_fewer_chips_take_longer():
  facts = {
    "mesh": {"data": 4},
    "num_chips": 16,
    "chunk_size": 64,
    "expected_batch_size": 256,
    "accumulate": {"seconds": {"arithmetic": 2.0, "links": 1.0}},
    "apply": {"seconds": {"memory": 1.0}},
  }
  rows = forecast.scaling(facts)
  assert [row["num_chips"] for row in rows] == [4, 8, 16]
  assert [row["step_seconds"] for row in rows] == [33.0, 17.0, 9.0]
  assert rows[-1]["efficiency"] == pytest.approx(33 * 4 / (9 * 16))


_PLAN = {
  "num_examples": 10,
  "expected_batch_size": 2.0,
  "num_steps": 2,
  "noise_multiplier": 1.0,
}


def test_tokens_need_no_data():
  config = config_lib.default()
  config.model.name = "stacked_decoder"
  config.data.name = "array_record"
  config.data.sequence_length = 12
  config.model.update({"width": 8, "depth": 1, "num_heads": 2})
  config.privacy.update(_PLAN)
  found = abstract_step.example(setup.build(config))
  assert {name: x.shape for name, x in found.items()} == {
    "inputs": (12,),
    "targets": (12,),
  }
  config = config_lib.default()
  config.model.width = 8
  config.privacy.update(_PLAN)
  found = abstract_step.example(setup.build(config))
  assert found["inputs"].shape == (8, 8, 1)
