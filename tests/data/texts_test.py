"""Tests of texts as data sets, of tokenizers and of pretrained models' files.

Files are small and made here, in the formats of the real ones.
"""

import json

from flax import traverse_util
import gguf
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dpdist import config as config_lib
from dpdist import models
from dpdist.assets import weights
from dpdist.data import users
from dpdist.data.datasets import chitchat
from dpdist.data.datasets import datasets
from dpdist.data.datasets import movie_reviews
from dpdist.data.datasets import state_of_the_union
from dpdist.data.features import minilm
from dpdist.distributed import mesh as mesh_lib
from dpdist.models import bert
from dpdist.models import stacked_decoder
from dpdist.tasks import cross_entropy
from dpdist.tasks import held_out as held_out_lib
from tests.support import packages

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture
def tokenizer(tmp_path):
  path = tmp_path / "tokenizer.json"
  packages.write_tokenizer(path)
  return str(path)


def _csv(folder, rows):
  path = folder / "reviews.csv"
  packages.write_reviews(path, rows)
  return path


def test_reviews_are_marked_cut_at_their_beginning_and_filled_up(
  tmp_path, tokenizer
):
  texts = ["good film", "bad<br />film", "film film film bad bad !"]
  rows = [(text, i % 2, "imdb") for i, text in enumerate(texts)]
  rows += [(f"film {i}", 0, "rotten_tomatoes") for i in range(40)]
  train, test = movie_reviews.load(
    _csv(tmp_path, rows), "imdb", sequence_length=6, tokenizer=tokenizer
  )
  found = {
    tuple(row): target
    for part in (train, test)
    for row, target in zip(
      *part.read(np.arange(len(part))).values(), strict=True
    )
  }
  assert found == {
    (1, 4, 6, 2, 0, 0): 0,
    (1, 5, 6, 2, 0, 0): 1,
    (1, 6, 5, 5, 7, 2): 0,
  }


def test_who_is_held_out_depends_on_nobody_else(tmp_path, tokenizer):
  rows = [(f"good {i}", i % 2, "imdb") for i in range(64)]
  load = lambda some: movie_reviews.load(
    _csv(tmp_path, some), "imdb", sequence_length=4, tokenizer=tokenizer
  )
  # Twice the same review is on one side.
  train, test = load(rows + rows)
  assert len(train) + len(test) == 128
  assert 4 <= len(test) <= 32
  held_out = [movie_reviews._is_held_out(text) for text, *_ in rows]
  assert len(test) == 2 * sum(held_out)
  fewer, _ = load(rows[:-1])
  assert len(fewer) == 63 - sum(held_out[:-1])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sequence_length": 2}, "must leave room for a token beside the 2 marks"),
    ({"tokenizer": "elsewhere"}, "data.tokenizer must be empty, a tokenizer"),
    ({"corpus": "rotten_tomatoes"}, "must hold reviews of rotten_tomatoes"),
  ],
)
def test_reviews_refuse(tmp_path, tokenizer, changes, message):
  path = _csv(tmp_path, [("good", 1, "imdb")])
  fields = {"corpus": "imdb", "sequence_length": 4, "tokenizer": tokenizer}
  with pytest.raises(ValueError, match=message):
    movie_reviews.load(path, **(fields | changes))


def _package(folder, speeches_of):
  path = folder / "sotu.tgz"
  packages.write_speeches(path, speeches_of)
  return path


_SPEECHES = (
  (1790, "ann", "abcdefgh"),
  (1797, "bob", "ABCDE"),
  (1800, "ann", "ijkl-"),
  (2001, "cleo", "01234567"),
)


def _text(piece):
  return bytes([*piece["inputs"], piece["targets"][-1]]).decode()


def _texts(source):
  rows = source.read(np.arange(len(source)))
  return [
    _text({name: x[i] for name, x in rows.items()}) for i in range(len(source))
  ]


def test_speeches_are_cut_within_themselves_and_late_years_held_out(tmp_path):
  path = _package(tmp_path, _SPEECHES)
  train, test = state_of_the_union.load(
    path, sequence_length=3, examples_per_unit=0
  )
  assert _texts(train) == ["abcd", "efgh", "ABCD", "ijkl"]
  assert _texts(test) == ["0123", "4567"]


def test_an_author_is_a_unit(tmp_path):
  path = _package(tmp_path, _SPEECHES)
  config = ml_collections.ConfigDict(
    {
      "name": "sotu",
      "path": str(path),
      "sequence_length": 3,
      "examples_per_unit": 3,
      "tokenizer": "",
    }
  )
  dataset = datasets.load(config)
  train, test = dataset.train, dataset.test
  assert (len(train), len(test)) == (2, 2)
  rows = train.read(np.arange(2))
  np.testing.assert_array_equal(
    rows[users.SLOT_IS_EMPTY], [[False, False, False], [False, True, True]]
  )
  assert bytes(rows["inputs"][0, 2].tolist()) == b"ijk"
  shared = _package(tmp_path, [*_SPEECHES, (2002, "bob", "01234567")])
  config.path = str(shared)
  with pytest.raises(ValueError, match=r"no author in both parts, got \['bob'"):
    datasets.load(config)


def test_what_is_left_over_of_tokens_is_a_padded_piece(tmp_path, tokenizer):
  message = lambda sender, text: {"sender": sender, "text": text}
  turns = [
    [message(sender, "good bad film ! good bad")]
    for sender in map(str, range(12))
  ]
  path = tmp_path / "dataset.json"
  path.write_text(json.dumps({"1": {"messages": turns}}))
  train, _ = chitchat.load(
    path, sequence_length=3, examples_per_unit=4, tokenizer=tokenizer
  )
  rows = train.read(np.zeros(1, np.int64))
  np.testing.assert_array_equal(
    rows["inputs"][0], [[4, 5, 6], [4, 5, 0], [0] * 3, [0] * 3]
  )
  np.testing.assert_array_equal(
    rows["targets"][0, :2], [[5, 6, 7], [5, -1, -1]]
  )


class _Table:
  """Logits that are a table of parameters."""

  def apply(self, variables, inputs, rngs=None):
    del rngs
    return variables["params"][inputs]


def test_padded_targets_count_for_nothing():
  rng = np.random.default_rng(0)
  params = jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)
  loss = cross_entropy.loss_of(_Table())
  example = {
    "inputs": np.array([1, 2, 3, 7], np.int32),
    "targets": np.array([2, 3, -1, -1], np.int32),
  }
  short = {name: x[:2] for name, x in example.items()}
  both = jax.jit(jax.value_and_grad(lambda p, x: loss(p, x, None)[0]))
  value, grad = both(params, example)
  want, want_grad = both(params, short)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  np.testing.assert_allclose(grad, want_grad, atol=1e-7)
  assert not np.any(np.asarray(grad)[[3, 7]])
  empty = example | {"targets": np.full(4, -1, np.int32)}
  value, grad = both(params, empty)
  assert value == 0
  assert not np.any(grad)
  # Measured by each target, and not by each sequence.
  held_out = {name: np.stack([example[name], empty[name]]) for name in example}
  mesh = mesh_lib.make({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
  task = cross_entropy.classification(_Table())
  scores = held_out_lib.Evaluator(task, held_out, mesh, params)(params)
  np.testing.assert_allclose(scores["loss"], want, rtol=1e-5)


# Pretrained models.


def _bert(**changes):
  sizes = {
    "classes": 2,
    "vocabulary": 16,
    "positions": 8,
    "width": 8,
    "depth": 1,
    "num_heads": 2,
    "hidden": 16,
    "lora_rank": 2,
    "dtype": jnp.float32,
  }
  return bert.Bert(**(sizes | changes))


def _params(model, inputs):
  """Of any values: what begins at zero would hide what it should not."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
  return jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32) / 4, shapes
  )


@pytest.mark.slow
def test_padding_is_seen_by_no_token_and_an_adapter_begins_at_nothing():
  model = _bert()
  tokens_ = np.array([3, 5, 7, 0, 0, 0], np.int32)
  params = _params(model, tokens_)
  query = params["block_0"]["query"]
  query["lora_up"] = np.zeros_like(query["lora_up"])
  value = params["block_0"]["value"]
  value["lora_up"] = np.zeros_like(value["lora_up"])
  run = jax.jit(
    lambda model, p, x: model.apply({"params": p}, x), static_argnums=0
  )
  apply = lambda model, tokens: run(model, params, tokens)
  logits = apply(model, tokens_)
  np.testing.assert_allclose(apply(model, tokens_[:3]), logits, rtol=1e-5)
  assert np.abs(apply(model, tokens_ + 1) - logits).max() > 1e-3
  without = apply(_bert(lora_rank=0), tokens_)
  np.testing.assert_allclose(without, logits, rtol=1e-6)
  for adapted in (query, value):
    adapted["lora_up"] = np.ones_like(adapted["lora_up"])
  assert np.abs(apply(model, tokens_) - logits).max() > 1e-4
  # Of padding alone, the gradient is a number too.
  grad = jax.jit(jax.grad(lambda p, x: jnp.sum(model.apply({"params": p}, x))))
  leaves = jax.tree.leaves(grad(params, 0 * tokens_))
  assert all(np.isfinite(x).all() for x in leaves)


@pytest.mark.slow
@pytest.mark.parametrize(
  "make", [lambda **x: _bert(**x), lambda **x: _decoder(**x)]
)
def test_alpha_scales_what_an_adapter_adds(make):
  tokens_ = np.array([3, 5, 7, 2], np.int32)
  model = make(lora_rank=2, lora_alpha=2.0)
  params = _params(model, tokens_)
  smaller = jax.tree.map_with_path(
    lambda path, x: x / 8 if "lora_up" in jax.tree_util.keystr(path) else x,
    params,
  )
  run = jax.jit(
    lambda model, p: model.apply({"params": p}, tokens_), static_argnums=0
  )
  logits = run(model, params)
  stronger = make(lora_rank=2, lora_alpha=16.0)
  np.testing.assert_allclose(
    run(stronger, smaller), logits, rtol=1e-4, atol=1e-6
  )
  assert np.abs(run(stronger, params) - logits).max() > 1e-4


def test_an_alpha_of_nothing_is_refused():
  config = config_lib.default().model
  config.update(
    name="bert", width=8, depth=1, num_heads=2, vocabulary=16, lora_alpha=0.0
  )
  with pytest.raises(ValueError, match=r"lora_alpha .* > 0, got 0\.0"):
    models.make(config)


@pytest.mark.slow
def test_blocks_that_are_run_ahead_change_nothing():
  tokens_ = np.array([3, 5, 7, 0, 0, 0], np.int32)
  whole = _bert(depth=3)
  params = _params(whole, tokens_)
  run = jax.jit(
    lambda model, x: model.apply({"params": params}, x), static_argnums=0
  )
  states = run(_bert(depth=2, lora_rank=2, returns_states=True), tokens_)
  assert states.shape == (6, 8)
  np.testing.assert_array_equal(states[3:], 0)
  rest = _bert(depth=3, first_block=2)
  np.testing.assert_allclose(
    run(rest, states), run(whole, tokens_), rtol=1e-5, atol=1e-6
  )
  # What is kept of the states has half the digits.
  np.testing.assert_allclose(
    run(rest, states.astype(np.float16)), run(whole, tokens_), atol=1e-2
  )
  init = jax.eval_shape(rest.init, jax.random.key(0), states)["params"]
  assert sorted(init) == ["block_2", "head"]
  arrays = packages.bert_arrays(
    vocabulary=16, positions=8, width=8, hidden=16, depth=3
  )
  found = rest.from_disk(arrays)
  assert found
  assert all(path.startswith("block_2/") for path in found)


@pytest.mark.slow
def test_states_of_minilm_are_those_of_its_own_blocks(tmp_path, monkeypatch):
  monkeypatch.setenv("DPDIST_CACHE", str(tmp_path))
  packages.write("minilm")
  inputs = np.array([[1, 4, 6, 2, 0], [1, 4, 2, 0, 0]], np.int32)
  states = minilm.states(inputs, blocks=5)
  assert states.shape == (2, 5, 384)
  rest = bert.Bert(
    classes=0,
    vocabulary=0,
    positions=8,
    width=384,
    depth=6,
    num_heads=12,
    hidden=1536,
    lora_rank=0,
    dtype=jnp.float32,
    first_block=5,
  )
  arrays = weights.read(weights.locate("minilm"))
  params = traverse_util.unflatten_dict(rest.from_disk(arrays), sep="/")
  features = jax.vmap(lambda x: rest.apply({"params": params}, x))(states)
  np.testing.assert_allclose(
    features, minilm.transform(inputs), rtol=1e-3, atol=1e-3
  )
  with pytest.raises(ValueError, match="made of tokens"):
    minilm.states(np.zeros((2, 5), np.float32), blocks=5)


def test_a_file_of_gguf_is_read_and_expanded(tmp_path):
  rng = np.random.default_rng(0)
  table = rng.normal(size=(4, 64)).astype(np.float32)
  packed = gguf.quantize(table, gguf.GGMLQuantizationType.Q8_0)
  path = tmp_path / "model.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_tensor(
    "token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0
  )
  writer.add_tensor("output_norm.weight", table[0])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  read = weights.read(path)
  assert read["token_embd.weight"].dtype == np.float32
  np.testing.assert_allclose(read["token_embd.weight"], table, atol=0.02)
  np.testing.assert_array_equal(read["output_norm.weight"], table[0])
  with pytest.raises(ValueError, match=r"must hold 'blk.0.attn_norm.weight'"):
    _decoder().from_disk(read | {"token_embd.weight": table})


def _decoder(**changes):
  sizes = {
    "vocabulary": 12,
    "width": 16,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "hidden": 24,
    "dtype": jnp.float32,
    "rope_theta": 100.0,
    "norm_epsilon": 1e-5,
  }
  return stacked_decoder.StackedDecoder(**(sizes | changes))


def _llama_logits(arrays, inputs):
  """In the layout of GGUF, where neighbours of a head turn together."""
  norm = lambda x, w: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * w
  positions = np.arange(len(inputs))[:, None]
  angles = positions * 100.0 ** (-np.arange(2) / 2)

  def turned(x):
    pairs = x.reshape(len(inputs), -1, 2, 2)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(len(inputs), -1, 4)

  x = arrays["token_embd.weight"][inputs].astype(np.float64)
  for i in range(2):
    take = lambda name, i=i: arrays[f"blk.{i}.{name}.weight"].astype(np.float64)
    y = norm(x, take("attn_norm"))
    q, k = turned(y @ take("attn_q").T), turned(y @ take("attn_k").T)
    v = (y @ take("attn_v").T).reshape(len(inputs), 2, 4)
    out = []
    for head in range(4):
      scores = q[:, head] @ k[:, head // 2].T / 2
      scores[np.triu_indices(len(inputs), 1)] = -np.inf
      scores = np.exp(scores - scores.max(1, keepdims=True))
      out.append(scores / scores.sum(1, keepdims=True) @ v[:, head // 2])
    x = x + np.concatenate(out, 1) @ take("attn_output").T
    y = norm(x, take("ffn_norm"))
    gate = y @ take("ffn_gate").T
    gated = gate / (1 + np.exp(-gate)) * (y @ take("ffn_up").T)
    x = x + gated @ take("ffn_down").T
  x = norm(x, arrays["output_norm.weight"])
  return x @ arrays["token_embd.weight"].T


def test_a_llama_from_disk_computes_what_it_should():
  arrays = packages.llama_arrays(
    vocabulary=12, width=16, kv_width=8, hidden=24, depth=2
  )
  inputs = np.array([3, 1, 4, 1, 5], np.int32)
  model = _decoder(lora_rank=2)
  params = _params(model, inputs)
  for name in ("query", "value"):
    params["blocks"][f"{name}_lora_up"] *= 0
  for path, array in model.from_disk(arrays).items():
    *folders, name = path.split("/")
    inner = params
    for folder in folders:
      inner = inner[folder]
    assert inner[name].shape == array.shape
    inner[name] = jnp.asarray(array)
  apply = jax.jit(lambda p: model.apply({"params": p}, inputs))
  logits = apply(params)
  np.testing.assert_allclose(
    logits, _llama_logits(arrays, inputs), rtol=2e-4, atol=2e-4
  )
  params["blocks"]["value_lora_up"] += 1
  assert np.abs(apply(params) - logits).max() > 1e-3
  with pytest.raises(ValueError, match="one table"):
    model.from_disk(arrays | {"output.weight": arrays["token_embd.weight"]})


def test_weights_that_are_not_there_are_named():
  config = config_lib.default().model
  config.weights = "elsewhere.safetensors"
  with pytest.raises(ValueError, match="must be empty for"):
    models.from_disk(config, None)
  with pytest.raises(ValueError, match="that was fetched, got 'elsewhere"):
    models.from_disk(config, _bert())
