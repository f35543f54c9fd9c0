"""The public API."""

import pydoc
import re
import subprocess
import sys
import types

import pytest

import dpdist
from tests.support import without_jax

_CODE = """
import dpdist
dpdist.accounting.epsilon(
  noise_multiplier=1.0, sampling_probability=0.1, num_steps=1, delta=1e-5
)
dpdist.PoissonSampler(num_examples=9, sampling_probability=0.5, seed=1)(0)
dpdist.make_plan(
  dpdist.PrivacyConfig(
    num_examples=100, expected_batch_size=10, num_steps=5, l2_clip_norm=1.0,
    target_delta=1e-5, noise_multiplier=1.0,
  )
)
import dpdist.ledger.ledger
"""


def test_accounting_plan_sampler_and_ledger_need_no_jax():
  done = without_jax.run(_CODE)
  assert done.returncode == 0, done.stderr


def test_jax_is_really_missing_there():
  assert without_jax.run("import jax").returncode != 0
  assert without_jax.run("import dpdist; dpdist.train").returncode != 0


def test_every_public_name_resolves():
  for name in dir(dpdist):
    assert getattr(dpdist, name) is not None
  assert callable(dpdist.train)
  assert isinstance(dpdist.data, types.ModuleType)
  assert dpdist.noise.gaussian_noise is dpdist.gaussian_noise


def test_help_lists_every_public_name_on_one_screen():
  text = pydoc.render_doc(dpdist, renderer=pydoc.plaintext)
  named = re.findall(r"\w+", text[: text.index("PACKAGE CONTENTS")])
  assert [name for name in dir(dpdist) if name not in named] == ["__version__"]
  assert len(dpdist.__doc__.splitlines()) < 25
  assert len(text.splitlines()) < 75


def test_importing_it_imports_no_module_of_it():
  code = """
import sys, dpdist
dir(dpdist), dpdist.__version__
print([name for name in sys.modules if name.startswith(("dpdist.", "numpy"))])
"""
  done = without_jax.run(code)
  assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_module_does_not_hide_the_name_that_it_is_home_to():
  code = (
    "import dpdist.training.train; assert callable(dpdist.train), dpdist.train"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'privte'"):
    _ = dpdist.privte
