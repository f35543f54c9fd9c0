"""Times Opacus against its own torch step, as JSON; see `clipping.py`.

  python -m tests.benchmarks.clipping_opacus

Wants torch and opacus, and nothing of dpdist.
"""

from collections.abc import Callable
import functools
import json
import statistics
import time
from typing import Any

from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
import torch
from torch import nn

_ROUNDS = 5
_TOKENS = 4096


class Residual(nn.Module):
  """A pre-activation block of WRN."""

  def __init__(self, inputs: int, outputs: int, stride: int):
    super().__init__()
    conv = lambda i, o, k, s: nn.Conv2d(i, o, k, s, k // 2, bias=False)
    self.before = nn.Sequential(nn.GroupNorm(16, inputs), nn.ReLU())
    self.inner = nn.Sequential(
      conv(inputs, outputs, 3, stride),
      nn.GroupNorm(16, outputs),
      nn.ReLU(),
      conv(outputs, outputs, 3, 1),
    )
    same = inputs == outputs and stride == 1
    self.shortcut = None if same else conv(inputs, outputs, 1, stride)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
    y = self.before(x)
    return self.inner(y) + (x if self.shortcut is None else self.shortcut(y))


class Block(nn.Module):
  """A block of the decoder: attention, then two dense layers."""

  def __init__(self, width: int):
    super().__init__()
    self.before = nn.LayerNorm(width)
    self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in "qkvo")
    self.dense = nn.Sequential(
      nn.LayerNorm(width),
      nn.Linear(width, 4 * width),
      nn.GELU(),
      nn.Linear(4 * width, width),
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    """[B, T, width] -> [B, T, width]."""
    y = self.before(x)
    heads = lambda z: z.unflatten(-1, (4, -1)).transpose(1, 2)
    q, k, v = heads(self.q(y)), heads(self.k(y)), heads(self.v(y))
    y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(y.transpose(1, 2).flatten(2))
    return x + self.dense(x)


class Decoder(nn.Module):
  """Width 256, four blocks, 4,096 tokens, separate head."""

  def __init__(self, length: int):
    super().__init__()
    self.tokens = nn.Embedding(_TOKENS, 256)
    self.positions = nn.Embedding(length, 256)
    self.blocks = nn.Sequential(*(Block(256) for _ in range(4)))
    self.head = nn.Sequential(
      nn.LayerNorm(256), nn.Linear(256, _TOKENS, bias=False)
    )

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, T, tokens]."""
    places = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
    return self.head(self.blocks(self.tokens(tokens) + self.positions(places)))


def _models() -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
  mlp = nn.Sequential(
    nn.Flatten(),
    nn.Linear(784, 512),
    nn.ReLU(),
    nn.Linear(512, 512),
    nn.ReLU(),
    nn.Linear(512, 10),
  )
  cnn = nn.Sequential(
    nn.Conv2d(1, 16, 8, 2, 3),
    nn.ReLU(),
    nn.MaxPool2d(2, 1),
    nn.Conv2d(16, 32, 4, 2),
    nn.ReLU(),
    nn.MaxPool2d(2, 1),
    nn.Flatten(),
    nn.Linear(512, 32),
    nn.ReLU(),
    nn.Linear(32, 10),
  )
  blocks, inputs = [], 16
  for width, first in ((64, 1), (128, 2), (256, 2)):
    for stride in (first, 1):
      blocks.append(Residual(inputs, width, stride))
      inputs = width
  wrn = nn.Sequential(
    nn.Conv2d(3, 16, 3, 1, 1, bias=False),
    *blocks,
    nn.GroupNorm(16, 256),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(256, 10),
  )
  return {
    "mlp": (mlp, (1, 28, 28), 256),
    "cnn": (cnn, (1, 28, 28), 512),
    "wrn-16-4": (wrn, (3, 32, 32), 32),
    "gpt, 128 tokens": (Decoder(128), (128,), 16),
    "gpt, 32 tokens": (Decoder(32), (32,), 64),
  }


def _losses(model: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
  """[B]."""
  logits = model(x)
  losses = nn.functional.cross_entropy(
    logits.flatten(0, -2), y.flatten(), reduction="none"
  )
  return losses.reshape(len(x), -1).mean(dim=1)


def _ordinary(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
  model.zero_grad(set_to_none=True)
  _losses(model, x, y).mean().backward()


def _hooks(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
  model.zero_grad(set_to_none=True)
  _losses(model, x, y).sum().backward()
  params = list(model.parameters())
  norms = torch.stack(
    [p.grad_sample.flatten(1).norm(dim=1) for p in params]
  ).norm(dim=0)
  scale = (1 / norms.clamp(min=1)).clamp(max=1)
  for p in params:
    p.grad = torch.einsum("b,b...->...", scale, p.grad_sample)
    p.grad_sample = None


def _ghost(model: Any, x: torch.Tensor, y: torch.Tensor) -> None:
  model.zero_grad(set_to_none=True)
  losses = _losses(model, x, y)
  losses.sum().backward(retain_graph=True)
  scale = model.get_clipping_coef().detach()
  model.zero_grad(set_to_none=True)
  model.disable_hooks()
  (losses * scale).sum().backward()
  model.enable_hooks()


def _time(step: Callable[[], None]) -> float:
  start = time.perf_counter()
  step()
  return time.perf_counter() - start


def main() -> None:
  """Prints the rows."""
  torch.manual_seed(0)
  rows = []
  for name, (plain, shape, size) in _models().items():
    copies = {key: _models()[name][0] for key in ("hooks", "ghost")}
    if len(shape) == 1:
      x = torch.randint(0, _TOKENS, (size, *shape))
      y = torch.randint(0, _TOKENS, (size, *shape))
    else:
      x, y = torch.randn(size, *shape), torch.randint(0, 10, (size,))
    hooks = GradSampleModule(copies["hooks"], loss_reduction="sum")
    ghost = GradSampleModuleFastGradientClipping(
      copies["ghost"],
      loss_reduction="sum",
      max_grad_norm=1.0,
      use_ghost_clipping=True,
    )
    steps = {
      "torch, ordinary": functools.partial(_ordinary, plain, x, y),
      "Opacus, hooks": functools.partial(_hooks, hooks, x, y),
      "Opacus, ghost": functools.partial(_ghost, ghost, x, y),
    }
    seconds: dict[str, list[float]] = {key: [] for key in steps}
    for step in steps.values():
      step()
    for _ in range(_ROUNDS):
      for key, step in steps.items():
        seconds[key].append(_time(step))
    base = seconds["torch, ordinary"]
    for key, mine in seconds.items():
      rows.append(
        {
          "model": name,
          "method": key,
          "milliseconds": 1e3 * statistics.median(mine),
          "time_ratio": statistics.median(
            a / b for a, b in zip(mine, base, strict=True)
          ),
          # torch does not tell before a run what it will allocate on a CPU.
          "memory_mebibytes": None,
          "memory_ratio": None,
          "examples_per_second": size / statistics.median(mine),
        }
      )
  print(json.dumps(rows))


if __name__ == "__main__":
  main()
