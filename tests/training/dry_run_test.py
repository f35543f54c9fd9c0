"""Nothing is charged before a step was compiled, and run once on zeros."""

import contextlib
import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from configs import digits
import dpdist
from dpdist import errors
from dpdist.keys import keys
from dpdist.ledger import history
from dpdist.ledger import ledger as ledger_lib
from dpdist.privacy import plan as plan_lib
from dpdist.tasks import from_config
from dpdist.tasks import held_out
from dpdist.training import dry_run
from dpdist.training import step as step_lib
from dpdist.workdir import checkpoints
from dpdist.workdir import manifest

pytestmark = pytest.mark.usefixtures("quick_compiles")

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 9999 bytes."


def _config(**changes):
  config = digits.get_config()
  config.model.width = 8
  config.privacy.target_epsilon = None
  config.privacy.noise_multiplier = 1.0
  config.privacy.accountant = "rdp"
  config.privacy.expected_batch_size = 64
  config.privacy.num_steps = 3
  config.insecure_seed = 7
  config.update_from_flattened_dict(changes)
  return config


def _patched(monkeypatch, owner, name, replaced):
  """Puts another function in the place of a compiled one of a step."""
  make = getattr(owner, name).func
  made = functools.cached_property(lambda self: replaced(make(self)))
  made.__set_name__(owner, name)
  monkeypatch.setattr(owner, name, made)


def _fails_above(most, text=_OUT_OF_MEMORY):
  """An accumulate that takes no more than so many rows, as a full device."""

  def replaced(compiled):
    def accumulate(params, accumulator, batch, is_padding_example, *rest):
      if len(is_padding_example) > most:
        raise jax.errors.JaxRuntimeError(text)
      return compiled(params, accumulator, batch, is_padding_example, *rest)

    return accumulate

  return replaced


def _nothing_is_left(workdir):
  """Of a run that was refused: no ledger, no secret, no checkpoint."""
  return [*workdir.iterdir()] == []


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
  """A run, and what it compiled and evaluated, in order."""
  seen = []
  with pytest.MonkeyPatch.context() as patch:
    listen = functools.partial(_listen, seen)
    patch.setattr(ledger_lib.Ledger, "reserve_through", listen())
    with _watched(seen):
      result = dpdist.train(_config(), tmp_path_factory.mktemp("run"))
  return seen, result


def _listen(seen):
  charge = ledger_lib.Ledger.reserve_through

  def reserve_through(self, stop_step):
    seen.append("charged")
    return charge(self, stop_step)

  return reserve_through


@contextlib.contextmanager
def _watched(seen):
  """Notes each program that XLA is given to compile."""

  def note(event, seconds, **kwargs):
    if event == "/jax/core/compile/backend_compile_duration":
      seen.append(kwargs.get("fun_name", ""))

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield
  finally:
    jax.monitoring.unregister_event_duration_listener(note)


def test_no_program_of_a_step_compiles_after_the_first_charge(compiled_once):
  seen, _ = compiled_once
  first = seen.index("charged")
  names = [f"jit({x})" for x in ("zeros", "accumulate", "apply", "sums")]
  # Two of accumulate: a step that the sentinel watches has one of its own.
  assert [seen[:first].count(name) for name in names] == [1, 2, 1, 1]
  assert not set(names) & set(seen[first:])


@pytest.mark.slow
def test_it_changes_nothing_of_a_run(compiled_once, tmp_path, monkeypatch):
  _, result = compiled_once
  monkeypatch.setattr(
    dry_run, "run", lambda config, progress, job: job.chunk_size
  )
  without = dpdist.train(_config(), tmp_path)
  assert without["params_sha256"] == result["params_sha256"]
  assert without["steps_charged"] == result["steps_charged"] == 3


@pytest.mark.slow
def test_with_exact_sums_nothing_compiles_late_either(tmp_path, monkeypatch):
  seen = []
  changes = {"clipping.exact_sum": True, "clipping.exact_group_size": 8}
  with monkeypatch.context() as patch:
    patch.setattr(ledger_lib.Ledger, "reserve_through", _listen(seen))
    with _watched(seen):
      dpdist.train(_config(**changes), tmp_path)
  late = set(seen[seen.index("charged") :])
  names = ("zeros", "add_group", "reduce", "finish", "sums", "_cut")
  assert not late & {f"jit({name})" for name in names}


def test_no_key_of_the_run_is_in_it(tmp_path, monkeypatch):
  derived, words = [], []
  derive, run = keys.derive, dry_run.run

  def tried(config, progress, job):
    before = len(derived)
    assert job.secret == b""
    size = run(config, progress, job)
    assert len(derived) == before
    return size

  def watched(compiled):
    def apply(state, accumulator, key, *release):
      words.append(jax.random.key_data(key).tolist())
      return compiled(state, accumulator, key, *release)

    return apply

  monkeypatch.setattr(
    keys, "derive", lambda *args, **kw: derived.append(1) or derive(*args, **kw)
  )
  monkeypatch.setattr(dry_run, "run", tried)
  _patched(monkeypatch, step_lib.Step, "apply", watched)
  dpdist.train(_config(**{"privacy.num_steps": 1}), tmp_path)
  assert words[0] == [0, 0]
  assert words[1] != [0, 0]
  assert len(words) == 2


def test_a_step_that_fails_costs_nothing_at_any_start(tmp_path, monkeypatch):
  _patched(
    monkeypatch, step_lib.Step, "accumulate", _fails_above(0, "INTERNAL: no")
  )
  for rate in (0.1, 0.2):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
      dpdist.train(_config(**{"optimizer.learning_rate": rate}), tmp_path)
  assert _nothing_is_left(tmp_path)


@pytest.mark.parametrize("half", ["apply", "evaluate"])
def test_nor_does_one_whose_second_half_fails(tmp_path, monkeypatch, half):
  def fails(*args, **kwargs):
    raise jax.errors.JaxRuntimeError(_OUT_OF_MEMORY)

  if half == "apply":
    _patched(monkeypatch, step_lib.Step, "apply", lambda compiled: fails)
  else:
    monkeypatch.setattr(held_out.Evaluator, "__call__", fails)
  with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
    dpdist.train(_config(), tmp_path)
  assert _nothing_is_left(tmp_path)


@pytest.mark.slow
def test_a_chunk_that_was_chosen_is_halved_until_it_fits(
  tmp_path, monkeypatch, capsys
):
  _patched(monkeypatch, step_lib.Step, "accumulate", _fails_above(24))
  result = dpdist.train(_config(), tmp_path / "run")
  shown = capsys.readouterr()
  # 64 and three standard deviations, in multiples of 8 devices; halves of it.
  assert [f"trying chunk_size {x}" in shown.err for x in (48, 40, 16)] == [
    *(False, True, True)
  ]
  assert result["steps_charged"] == 3
  # The same chunk, set by hand: bit by bit the same run.
  again = dpdist.train(_config(chunk_size=16), tmp_path / "set")
  assert again["params_sha256"] == result["params_sha256"]


def test_another_chosen_chunk_is_another_branch(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(checkpoints.Checkpoints, "save", _interrupted)
    with pytest.raises(KeyboardInterrupt):
      dpdist.train(_config(), tmp_path)
  # The same settings, and less memory: sums round otherwise.
  _patched(monkeypatch, step_lib.Step, "accumulate", _fails_above(24))
  dpdist.train(_config(), tmp_path)
  ledger = ledger_lib.Ledger(tmp_path / "ledger")
  assert len({branch.fingerprint for branch in ledger.branches}) == 2
  assert ledger.spent_steps == 3


def _interrupted(*args, **kwargs):
  raise KeyboardInterrupt


def test_a_chunk_that_was_set_is_named(tmp_path, monkeypatch):
  _patched(monkeypatch, step_lib.Step, "accumulate", _fails_above(24))
  with pytest.raises(errors.SettingsError) as error:
    dpdist.train(_config(chunk_size=64), tmp_path)
  for part in ("chunk_size must", "or 0", "64", "32 may fit"):
    assert part in str(error.value)
  assert _nothing_is_left(tmp_path)


def test_the_smallest_chunk_that_does_not_fit_ends_the_search(
  tmp_path, monkeypatch
):
  _patched(monkeypatch, step_lib.Step, "accumulate", _fails_above(0))
  with pytest.raises(errors.SettingsError, match="smallest chunk_size, 8"):
    dpdist.train(_config(), tmp_path)
  assert _nothing_is_left(tmp_path)


def test_a_finished_run_tries_nothing(tmp_path, monkeypatch):
  dpdist.train(_config(**{"privacy.num_steps": 1}), tmp_path)
  _patched(monkeypatch, step_lib.Step, "accumulate", _fails_above(0))
  dpdist.train(_config(**{"privacy.num_steps": 1}), tmp_path)
  # But one that goes on under other settings does, and has spent no more.
  with pytest.raises(errors.SettingsError, match="smallest chunk_size, 8"):
    dpdist.train(_config(**{"privacy.num_steps": 2}), tmp_path)
  assert ledger_lib.Ledger(tmp_path / "ledger").spent_steps == 1


_PLAN = plan_lib.make_plan(
  plan_lib.PrivacyConfig(
    num_examples=100,
    expected_batch_size=10,
    num_steps=25,
    l2_clip_norm=1.0,
    target_delta=1e-5,
    noise_multiplier=1.0,
    accountant="rdp",
  )
)


def _forked(ledger, charged):
  """At step 20, whose checkpoint was away when a branch began at step 10."""
  ledger.reserve_through(20)
  ledger.record_checkpoint(10, "ten")
  ledger.record_checkpoint(20, "twenty")
  ledger.resume(step=10, digest="ten", ledger_head="", fingerprint="g")
  ledger.reserve_through(charged)


@pytest.mark.parametrize("fingerprint", ["f", "g"])
@pytest.mark.parametrize("charged", [11, 13, 15])
def test_whoever_will_charge_a_step_tries_it_out(
  tmp_path, charged, fingerprint
):
  with ledger_lib.Ledger(tmp_path) as ledger:
    ledger.acquire()
    ledger.open(
      config={}, plan=_PLAN, data="d" * 64, secret_hash="5" * 64, run="a run"
    )
    ledger.resume(step=0, digest="", ledger_head="", fingerprint="f")
    _forked(ledger, charged)
    saved = history.CheckpointRef(20, "twenty", 1)
    job = types.SimpleNamespace(
      ledger=ledger, changes=[], found=manifest.ResumePoint(saved, [])
    )
    is_tried = dry_run._is_to_train(job)
    ledger.resume(
      step=20, digest="twenty", ledger_head="", fingerprint=fingerprint
    )
    assert is_tried == (ledger.last_step > 20)
    assert is_tried == (charged < 15)


def test_parameters_that_are_no_numbers_are_refused_before_a_charge(tmp_path):
  config = _config()
  task = from_config.make(config)
  nan = lambda key, example: jax.tree.map(
    lambda x: x * np.nan, task.init(key, example)
  )
  with pytest.raises(errors.SettingsError, match="return finite numbers"):
    dpdist.train(config, tmp_path, task=dataclasses.replace(task, init=nan))
  assert _nothing_is_left(tmp_path)
