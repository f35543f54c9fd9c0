"""Parameters of any tree are exported by their paths, and loaded into one."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

from dpdist.export import export
from dpdist.tasks import parts


def _model(width=4):
  return eqx.filter(
    eqx.nn.MLP(2, "scalar", width, 1, key=jax.random.key(0)), eqx.is_array
  )


def _exported(params, folder):
  arrays = {name: np.array(x) for name, x in export.by_name(params).items()}
  safetensors.save_file(arrays, folder / "model.safetensors")
  settings = {"model": {"name": parts.GIVEN}}
  (folder / "config.json").write_text(json.dumps(settings))


def test_a_module_comes_back_as_it_was(tmp_path):
  params = _model()
  assert set(export.by_name(params)) == {
    f"layers.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")
  }
  _exported(params, tmp_path)
  model, loaded = export.load(tmp_path, params)
  assert model is None
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  _, nested = export.load(tmp_path)
  np.testing.assert_array_equal(
    nested["layers"]["0"]["weight"], params.layers[0].weight
  )


def test_another_template_is_refused(tmp_path):
  _exported(_model(), tmp_path)
  with pytest.raises(ValueError, match="template must be a tree of parameters"):
    export.load(tmp_path, _model(width=5))


def test_paths_that_are_one_when_joined_are_refused():
  with pytest.raises(ValueError, match="parameters must have paths that"):
    export.by_name({"a.b": np.ones(1), "a": {"b": np.zeros(1)}})
