"""Computes a digest of the code outside of this project that a plan names."""

import hashlib
import json

import numpy as np

from dpdist import registry
from dpdist.accounting import step_events
from dpdist.clipping import clipper as clipper  # Registers ours.
from dpdist.noise import noise as noise  # Registers ours.
from dpdist.privacy import plan as plan_lib
from dpdist.privacy import rules

# Steps of which a sampling's draws are in the digest.
_STEPS = 8


def sha256(plan: plan_lib.PrivacyConfig | plan_lib.PrivacyPlan) -> str:
  """Returns the SHA-256 of a plan's code outside of this project, or "".

  It is of the sampling, the noise, the clipper and their proof; and of what the
  sampling draws in a few steps with a public seed, since a file or a library
  that it reads may decide that too. (The others compute in programs, which have
  a digest of their own.)
  """
  digests = {}
  for kind, setting in (
    ("sampling", "sampling"),
    ("noise", "noise"),
    ("clipper", "clipping"),
  ):
    name = getattr(plan, setting)
    registry.resolve(kind, name, setting=setting)
    digests[kind] = registry.code_sha256(kind, name, setting=setting)
  digests["proof"] = step_events.proof_sha256(
    plan.sampling, plan.noise, plan.clipping
  )
  if not any(digests.values()):
    return ""
  if digests["sampling"]:
    digests["draws"] = _draws(plan)
  return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _draws(plan: plan_lib.PrivacyConfig | plan_lib.PrivacyPlan) -> str:
  make = rules.sampling_of(plan).make
  batch_size = plan.expected_batch_size
  draw = make(plan, batch_size, seed=bytes(32), first_release=0)
  digest = hashlib.sha256()
  for step in range(_STEPS):
    rows = np.asarray(draw(step), np.int64)
    digest.update(f"{len(rows)} ".encode() + rows.tobytes())
  return digest.hexdigest()
