"""What the registries carry, made up and small, in the formats it comes in.

With these in the cache, every config runs without a network.
"""

from collections.abc import Callable, Iterable, Sequence
import csv
import gzip
import io
import json
import pathlib
import struct
import tarfile

import gguf
import numpy as np
from PIL import Image
import safetensors.numpy as safetensors_numpy
import tokenizers

from dpdist.assets import fetch
from dpdist.data.datasets import movie_reviews

# Of the tokenizers here; the first is what pads.
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "!")


def write(name: str) -> None:
  """Puts a data set or a model into the cache.

  Args:
    name: a key of `fetch.PACKAGES`.
  """
  folder = fetch.folder(name)
  folder.mkdir(parents=True)
  _WRITERS[name](folder)


def write_idx(path: pathlib.Path, array: np.ndarray) -> None:
  """Writes bytes as MNIST has them, gzipped if the path says so."""
  header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
  content = header + array.tobytes()
  is_gzipped = path.suffix == ".gz"
  path.write_bytes(gzip.compress(content) if is_gzipped else content)


def write_tokenizer(path: pathlib.Path) -> None:
  """Writes a tokenizer.json of words, with BERT's marks."""
  ids = {word: i for i, word in enumerate(WORDS)}
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(ids, unk_token="[UNK]")
  )
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  inner.post_processor = tokenizers.processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
  )
  # As in the file that MiniLM comes with; to a reader neither may happen.
  inner.enable_padding(length=9)
  inner.enable_truncation(2)
  inner.save(str(path))


def write_reviews(
  path: pathlib.Path, rows: Iterable[tuple[str, int, str]]
) -> None:
  """Writes texts, their labels and the corpora they are from."""
  with open(path, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(("text", "label", "source"))
    writer.writerows(rows)


def write_speeches(
  path: pathlib.Path, speeches: Sequence[tuple[int, str, str]]
) -> None:
  """Writes years, authors and texts, not in the order of the years."""
  with tarfile.open(path, "w:gz") as archive:
    for year, name, text in reversed(speeches):
      speech = json.dumps({"year": str(year), "name": name, "text": text})
      info = tarfile.TarInfo(f"package/data/{year}_{name}.json")
      info.size = len(speech)
      archive.addfile(info, io.BytesIO(speech.encode()))
      # The same once more, as it is there too.
      archive.addfile(tarfile.TarInfo(f"package/data/{year}_{name}.txt"))


def write_cifar10(folder: pathlib.Path, rows: int) -> None:
  """Writes five pictures of so many images, and one of two more."""
  rng = np.random.default_rng(0)
  sizes = {f"data_batch_{i}": rows for i in range(1, 6)}
  for name, size in (sizes | {"test_batch": rows + 1}).items():
    pixels = rng.integers(0, 256, (size, 1024, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
  for name, size in (("train", 5 * rows), ("test", rows + 1)):
    labels = [(3 * i + 1) % 10 for i in range(size)]
    (folder / f"{name}_lables.json").write_text(json.dumps(labels))


def bert_arrays(
  *, vocabulary: int, positions: int, width: int, hidden: int, depth: int
) -> dict[str, np.ndarray]:
  """Of a BERT of any values, in the layout of Hugging Face's."""
  rng = np.random.default_rng(6)
  new = lambda *shape: rng.normal(size=shape).astype(np.float32)
  arrays = {
    "embeddings.word_embeddings.weight": new(vocabulary, width),
    "embeddings.position_embeddings.weight": new(positions, width),
    "embeddings.token_type_embeddings.weight": new(2, width),
    "pooler.dense.weight": new(width, width),  # Not used.
  }
  norms = ["embeddings.LayerNorm"]
  for layer in (f"encoder.layer.{i}" for i in range(depth)):
    for name, shape in (
      *((f"attention.self.{x}", (width,) * 2) for x in ("query", "key")),
      ("attention.self.value", (width, width)),
      ("attention.output.dense", (width, width)),
      ("intermediate.dense", (hidden, width)),
      ("output.dense", (width, hidden)),
    ):
      arrays[f"{layer}.{name}.weight"] = new(*shape)
      arrays[f"{layer}.{name}.bias"] = new(shape[0])
    norms.append(f"{layer}.attention.output.LayerNorm")
    norms.append(f"{layer}.output.LayerNorm")
  for name in norms:
    arrays[f"{name}.weight"], arrays[f"{name}.bias"] = new(width), new(width)
  return arrays


def llama_arrays(
  *, vocabulary: int, width: int, kv_width: int, hidden: int, depth: int
) -> dict[str, np.ndarray]:
  """Of a Llama of any values, in the layout of GGUF."""
  rng = np.random.default_rng(1)
  new = lambda *shape: rng.normal(size=shape).astype(np.float32) / 4
  arrays = {
    "token_embd.weight": new(vocabulary, width),
    "output_norm.weight": 1 + new(width),
  }
  shapes = {
    "attn_norm": (width,),
    "ffn_norm": (width,),
    "attn_q": (width, width),
    "attn_k": (kv_width, width),
    "attn_v": (kv_width, width),
    "attn_output": (width, width),
    "ffn_gate": (hidden, width),
    "ffn_up": (hidden, width),
    "ffn_down": (width, hidden),
  }
  for i in range(depth):
    arrays |= {
      f"blk.{i}.{k}.weight": new(*shape) for k, shape in shapes.items()
    }
  return arrays


def _adult(folder: pathlib.Path) -> None:
  record = "{}, Private, 1, Bachelors, 8, Divorced, Sales, Wife, Black, Female,"
  record += " 0, 0, 40, Cuba, {}\n"
  for part, size, end in (("data", 60, ""), ("test", 20, ".")):
    rows = [
      record.format(20 + i, (">50K" if i % 3 else "<=50K") + end)
      for i in range(size)
    ]
    (folder / f"adult.{part}").write_text("".join(rows))


def _chitchat(folder: pathlib.Path) -> None:
  turns = [
    [{"sender": f"{i:06}", "text": f"{i} is what I say. " * 20}]
    for i in range(40)
  ]
  (folder / "dataset.json").write_text(json.dumps({"0": {"messages": turns}}))


def _mnist(folder: pathlib.Path, suffix: str) -> None:
  rng = np.random.default_rng(0)
  for prefix, size in (("train", 60), ("t10k", 20)):
    images = rng.integers(0, 256, (size, 28, 28), np.uint8)
    labels = rng.integers(0, 10, size, np.uint8)
    write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)


def _minilm(folder: pathlib.Path) -> None:
  arrays = bert_arrays(
    vocabulary=30_522, positions=512, width=384, hidden=1536, depth=6
  )
  safetensors_numpy.save_file(arrays, folder / "model.safetensors")
  write_tokenizer(folder / "tokenizer.json")


def _movie_reviews(folder: pathlib.Path) -> None:
  corpora = ("imdb", "rotten_tomatoes")
  rows = [
    (f"{'good' if i % 2 else 'bad'} film {i}", i % 2, corpus)
    for i in range(64)
    for corpus in corpora
  ]
  write_reviews(folder / movie_reviews.FILE, rows)


def _smollm2(folder: pathlib.Path) -> None:
  # All bytes, as a byte-level BPE writes them, and one pair of them.
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = [*letters, "is"]
  arrays = llama_arrays(
    vocabulary=len(vocabulary), width=36, kv_width=12, hidden=48, depth=2
  )
  writer = gguf.GGUFWriter(folder / "SmolLM2-135M-Instruct.Q4_1.gguf", "llama")
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(vocabulary)
  writer.add_token_merges(["i s"])
  for name, array in arrays.items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _sotu(folder: pathlib.Path) -> None:
  speeches = [
    (1790 + 10 * i, f"author-{i}", f"{i} is what I say. " * 40)
    for i in range(24)
  ]
  write_speeches(folder / fetch.PACKAGES["sotu"].file, speeches)


_WRITERS: dict[str, Callable[[pathlib.Path], None]] = {
  "adult": _adult,
  "chitchat": _chitchat,
  "cifar10": lambda folder: write_cifar10(folder, 12),
  "fashion_mnist": lambda folder: _mnist(folder, ".gz"),
  "minilm": _minilm,
  "mnist": lambda folder: _mnist(folder, ""),
  "movie_reviews": _movie_reviews,
  "smollm2": _smollm2,
  "sotu": _sotu,
}
