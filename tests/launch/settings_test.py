"""Settings by flags: types, free sections, and what a wrong name means."""

import ml_collections
import pytest

from dpdist import _settings
from dpdist import config as config_lib
from launch.cli import settings
from tests.support import commands


def _changed(*argv, config=None):
  """The config, its changes and the other arguments of a command line."""
  config = config_lib.default() if config is None else config
  rest, changes = settings.take(argv)
  made = settings.change(config, changes)
  config_lib.check(config)
  return config, made, rest


def _get(config, path):
  for part in path.split("."):
    config = config[part]
  return config


@pytest.mark.parametrize(
  ("path", "text", "value"),
  [
    ("privacy.num_steps", "1e3", 1000),
    ("privacy.num_steps", "1_000", 1000),
    ("privacy.num_steps", "2.0", 2),
    ("mesh.data", "-1", -1),
    ("insecure_seed", "1e3", 1000),
    ("privacy.truncated_batch_size", "64", 64),
    ("privacy.target_epsilon", "3", 3.0),
    ("privacy.l2_clip_norm", "1e-3", 0.001),
    ("clipping.exact_sum", "true", True),
    ("clipping.exact_sum", "0", False),
    ("model.trainable", "", ""),
    ("data.path", "None", "None"),
    ("privacy.noise_schedule", "((5, 1.0), (9, 2.0))", ((5, 1.0), (9, 2.0))),
    ("privacy.noise_schedule", "", ()),
    ("optimizer.options.momentum", "0.9", 0.9),
    ("optimizer.options.nesterov", "True", True),
    ("privacy.noise_options.kind", "geometric", "geometric"),
  ],
)
def test_a_value_has_the_type_of_its_setting(path, text, value):
  config, made, rest = _changed(f"--config.{path}={text}", "--other", "3")
  assert _get(config, path) == value == made[path]
  assert type(_get(config, path)) is type(value)
  assert rest == ["--other", "3"]


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("privacy.num_steps=1.5", "num_steps must be an integer, got '1.5'"),
    ("privacy.num_steps=1e400", "num_steps must be an integer"),
    ("privacy.num_steps=nan", "num_steps must be an integer"),
    ("insecure_seed=x", "insecure_seed must be None or an integer, got 'x'"),
    ("ema_decay=x", "ema_decay must be a number, got 'x'"),
    ("clipping.exact_sum=x", "exact_sum must be True or False, got 'x'"),
    ("privacy.noise_schedule=x", "noise_schedule must be a tuple"),
    ("privacy=1", "config.privacy is a section"),
    ("privacy.num_steps.x=1", "there is no setting config.privacy.num_steps.x"),
    ("user.mine=1", "defines those of config.user, which are none"),
    ("privacy.noise_options.a.b=1", "there is no setting"),
  ],
)
def test_a_wrong_value_is_named_with_what_is_right(flag, said):
  with pytest.raises(ValueError, match=r".") as raised:
    _changed(f"--config.{flag}")
  assert said in str(raised.value)


def test_the_forms_of_a_flag():
  config, made, _ = _changed(
    *("--config.unsafe_metrics", "--config.privacy.num_steps", "3"),
    *("--noconfig.unsafe_metrics", "-config.mesh.data", "-1"),
    *("--config.augmentation.flip", "--config.privacy.num_steps=5"),
  )
  assert config.unsafe_metrics is False
  assert config.augmentation.flip is True
  assert config.mesh.data == -1
  assert made["privacy.num_steps"] == config.privacy.num_steps == 5
  # Of a command that passes arguments on, these are another's.
  assert settings.take(["--", "--config.mesh.data=1"])[1] == []


def test_a_section_of_ones_own_has_the_flags_that_the_file_defines():
  config = config_lib.default()
  config.user = ml_collections.ConfigDict({"size": 3, "deep": {"rate": 0.5}})
  config.lock()
  _changed("--config.user.size=4", "--config.user.deep.rate=2", config=config)
  assert config.user.to_dict() == {"size": 4, "deep": {"rate": 2.0}}
  with pytest.raises(ValueError, match=r"which are config\.user\.deep"):
    _changed("--config.user.sise=4", config=config)
  config.user.size = 5
  with config.unlocked():
    config.user.thing = object()
  with pytest.raises(ValueError, match=r"config\.user must hold numbers"):
    config_lib.check(config)


@pytest.mark.parametrize(
  ("wrong", "meant"),
  [
    ("privacy.target_epsilonn", "privacy.target_epsilon"),
    ("privacy.num_stpes", "privacy.num_steps"),
    ("privcy", "privacy"),
    ("privcy.num_steps", "privacy.num_steps"),
    ("noise_multiplier", "privacy.noise_multiplier"),
    ("privacy.max_grad_norm", "privacy.l2_clip_norm"),
    ("clipping.clipping_norm", "privacy.l2_clip_norm"),
    ("l2_norm_clip", "privacy.l2_clip_norm"),
    ("privacy.noise_scale", "privacy.noise_multiplier"),
    ("privacy.sample_rate", "privacy.expected_batch_size"),
    ("target_delta", "privacy.target_delta"),
    ("privacy.epsilon", "privacy.target_epsilon"),
    ("optimizer.momentum", "optimizer.options.momentum"),
    ("optimizer.lr", "optimizer.learning_rate"),
  ],
)
def test_a_wrong_name_says_which_is_meant(wrong, meant):
  with pytest.raises(ValueError, match=rf"did you mean config\.{meant}\?"):
    raise config_lib.unknown(wrong)


def test_what_is_like_no_setting_means_none():
  assert _settings.suggest("zzz") == ""


def test_all_that_other_names_mean_is_there():
  known = set(_settings.TABLE)
  for meant in _settings._ELSEWHERE.values():
    section = meant.rpartition(".")[0]
    assert meant in known or config_lib.is_free(section), meant


def test_every_setting_says_what_it_is():
  default = config_lib.default()
  for setting in _settings.settings():
    assert len(setting.meaning) > 3, setting
    value = _get(default, setting.path)
    assert isinstance(value, ml_collections.ConfigDict) == (
      setting.type in ("", "section")
    )
    if setting.default == "None":
      assert value is None
      assert setting.path in config_lib.optional()


@pytest.mark.parametrize(
  ("args", "said"),
  [
    (("--workdirr=x",), "there is no flag --workdirr: did you mean --workdir?"),
    (
      ("--max_grad_norm=1",),
      "no flag --max_grad_norm: did you mean --config.privacy.l2_clip_norm?",
    ),
    (
      ("--privacy.target_epsilon=1",),
      "did you mean --config.privacy.target_epsilon?",
    ),
    (("--zzzzzz=1",), "there is no flag --zzzzzz\n"),
    (
      ("--workdir=x", "--config.data.path=x"),
      "changes a setting of the file in --config, which is not given",
    ),
  ],
)
def test_a_wrong_flag_says_which_is_meant(args, said):
  done = commands.run("eval", *args)
  assert done.code == 2
  assert said in done.err
  assert "Traceback" not in done.err


_EPOCHS = {"num_examples": 60_000, "expected_batch_size": 600.0}


@pytest.mark.parametrize(
  ("epochs", "steps"), [(1, 100), (0.1, 10), (0.101, 11), (3.3, 330)]
)
def test_epochs_are_so_many_steps(epochs, steps):
  config = config_lib.default()
  config.privacy.update(_EPOCHS, epochs=epochs, noise_multiplier=1.0)
  plan = config_lib.privacy_config(config)
  assert plan.num_steps == steps
  resolved = config_lib.resolve(config)
  assert (resolved.privacy.num_steps, resolved.privacy.epochs) == (steps, None)
  assert config.privacy.epochs == epochs
  config.privacy.update(num_steps=steps, epochs=None)
  assert config_lib.privacy_config(config) == plan
  assert config_lib.resolve(config) is config


@pytest.mark.parametrize(
  ("values", "said"),
  [
    ({"num_steps": 3}, "num_steps must be 0 where privacy.epochs is set"),
    ({"batch_size_schedule": ((2, 3.0),)}, "must be None with a privacy.batch"),
    ({"epochs": 0.0}, "must be finite and > 0, got 0,"),
    ({"expected_batch_size": 0.0}, "must be finite and > 0"),
  ],
)
def test_epochs_that_count_no_steps_are_refused(values, said):
  config = config_lib.default()
  config.privacy.update(_EPOCHS, epochs=1.0, noise_multiplier=1.0)
  config.privacy.update(values)
  with pytest.raises(ValueError, match=r".") as raised:
    config_lib.privacy_config(config)
  assert said in str(raised.value)
