"""Every Python block of README.md and the docs runs as it stands.

What a block takes from its reader (a loss, parameters, a batch) is given to it
here, and nothing else: a name that it forgets to define is an error.
"""

import functools
import importlib.util
import os
import pathlib
import re
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpdist
from dpdist.privacy import plan as plan_lib

pytestmark = pytest.mark.usefixtures("quick_compiles")

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PAGES = (
  "README.md",
  *sorted(x.relative_to(_ROOT) for x in _ROOT.glob("docs/**/*.md")),
)
_FENCED = re.compile(r"(?ms)^```python\n(.*?)^```$")


def _blocks():
  for page in _PAGES:
    for match in _FENCED.finditer((_ROOT / page).read_text()):
      yield str(page), match[1]


def _loss(params, example):
  out = jnp.tanh(example["x"] @ params["backbone"]["w"]) @ params["head"]
  return jnp.mean((out - example["y"]) ** 2)


def _loss_with_state(params, state, rng, example):
  logits = example["x"] @ params["backbone"]["w"]
  kept = jax.random.bernoulli(rng, 0.5, logits.shape)
  loss = jnp.mean((jnp.where(kept, logits, 0) @ params["head"]) ** 2)
  return loss, (state + 1, {"accuracy": loss > 0, "logits": logits})


def _given():
  """What the reader has."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"backbone": {"w": draw(3, 4)}, "head": draw(4, 2)}
  batch = {"x": draw(4, 3), "y": draw(4, 2)}
  return {
    "add_noise": lambda total: total,
    "batch": batch,
    "key": jax.random.key(0),
    "loss_fn": _loss,
    "loss_with_state": _loss_with_state,
    "network_state": jnp.zeros(()),
    "params": params,
    "parts_of_one_draw": [batch, batch],
  }


def _of_a_plan():
  plan = dpdist.make_plan(
    dpdist.PrivacyConfig(
      num_examples=60_000,
      expected_batch_size=256,
      num_steps=10,
      l2_clip_norm=1.0,
      target_delta=1e-6,
      noise_multiplier=1.0,
    )
  )
  return {"dpdist": dpdist, "optax": optax, "plan": plan, "secret": bytes(32)}


class _Normalised(nnx.Module):
  def __init__(self):
    self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))


def _model_to_check():
  loss = lambda params, x, rng: jnp.sum((params["w"] * x) ** 2)
  return {
    **{"dpdist": dpdist, "model": _Normalised(), "loss_fn": loss},
    **{"batch": jnp.ones((4, 3)), "params": {"w": jnp.ones(3)}},
  }


def _arrays():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(512, 64)).astype(np.float32)
  y = rng.integers(0, 10, 512)
  held_out = rng.normal(size=(50, 64)).astype(np.float32)
  return {"x": x, "y": y, "x_test": held_out, "y_test": y[:50]}


def _examples():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {"x": draw(512, 3), "y": draw(512, 2)}


def _data_for_a_session():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "data": {"x": draw(64, 3), "y": draw(64, 2)},
    "loss": lambda params, example, key: _loss(params, example),
  }


# By what stands in a block: what else is around it on the page.
_AROUND = {
  "for t in range(plan.num_steps)": _examples,
  "gradients = dpdist.private_gradients": lambda: {
    **{"dpdist": dpdist, "secret": bytes(32)}
  },
  "optimizer = optax.chain(": _of_a_plan,
  "clipping.VirtualStep(": lambda: {
    **{"dpdist": dpdist, "optax": optax, "optimizer": optax.sgd(0.1)}
  },
  "dpdist.check_model(": _model_to_check,
  "dpdist.Session(": _data_for_a_session,
  "import keras as private_keras": _arrays,
}


def _run(text, tmp_path, monkeypatch):
  """Runs a block; its plans are made by the quicker accountant."""
  quick = functools.partial(plan_lib.PrivacyConfig, accountant="rdp")
  monkeypatch.setattr(dpdist, "PrivacyConfig", quick)
  scope = _given()
  for sign, make in _AROUND.items():
    if sign in text:
      scope |= make()
  text = text.replace("/tmp/run", str(tmp_path / "run"))
  exec(compile(text, "a block of the page", "exec"), scope)
  return scope


def _run_as_a_file(text, tmp_path, monkeypatch):
  """Runs a whole program: code that reads data has to be in a file."""
  path = tmp_path / "tutorial.py"
  path.write_text(text.replace("/tmp/run", str(tmp_path / "run")))
  os.utime(path, (1, 1))  # Before this process began.
  spec = importlib.util.spec_from_file_location("tutorial", path)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, "tutorial", module)
  spec.loader.exec_module(module)


# They train, or compile much.
_SLOW = (
  *("private_keras", "DPConfig(", "VirtualStep(", "optax.chain("),
  "dpdist.Session(",
)
_SLOW_PAGES = (
  *("docs/migrating/", "docs/library.md", "docs/models_and_tasks.md"),
  "docs/tutorials/",
)


def _marked():
  for page, text in _blocks():
    is_slow = any(sign in text for sign in _SLOW)
    is_slow = is_slow or page.startswith(_SLOW_PAGES)
    slow = [pytest.mark.slow] if is_slow else []
    name = f"{page}: {text.strip().splitlines()[-1].strip()[:40]}"
    yield pytest.param(text, id=name, marks=slow)


# Keras's own, where it reads its variables.
@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("text", list(_marked()))
def test_a_block_runs_as_it_stands(text, tmp_path, monkeypatch, capsys):
  if "tokenizers=" in text and "dpdist.train(" in text:
    _run_as_a_file(text, tmp_path, monkeypatch)
    assert capsys.readouterr().out
    return
  scope = _run(text, tmp_path, monkeypatch)
  if "def step(" in text:  # It defines a step: that runs too.
    params, batch = scope["params"], scope["batch"]
    states = scope["opt_state"], scope["noise_state"]
    after, *_ = scope["step"](params, *states, batch, np.zeros(4, bool))
    assert np.all(np.isfinite(after["head"]))
  if "print(" in text:
    assert capsys.readouterr().out


def test_a_block_that_does_not_run_is_found(tmp_path, monkeypatch):
  with pytest.raises(NameError, match="forgotten"):
    _run("forgotten()", tmp_path, monkeypatch)
  assert len(list(_blocks())) >= 7


def test_no_block_shows_a_secret_that_can_be_guessed():
  """People copy what they read."""
  for page, text in _blocks():
    assert not re.search(r"seed=(\d|b\")", text), page
