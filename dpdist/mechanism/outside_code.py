"""Computes a digest of the code outside of this project that a plan names."""

import hashlib
import json

from dpdist import registry
from dpdist.accounting import step_events
from dpdist.clipping import clipper as clipper  # Registers ours.
from dpdist.noise import noise as noise  # Registers ours.
from dpdist.privacy import plan as plan_lib


def sha256(plan: plan_lib.PrivacyConfig | plan_lib.PrivacyPlan) -> str:
  """Returns the SHA-256 of a plan's code outside of this project, or "".

  It is of the sampling, the noise, the clipper and their proof.
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
  return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
