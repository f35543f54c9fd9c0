"""Computes the delta of one Gaussian against another, never too small.

Imports no jax.
"""

import math

from scipy import special

# Relative error of a logarithm, and of the numbers it was computed from.
ROUNDING = 2.0**-50
# Relative error of a Mills ratio; SciPy's were seen off by 5 * 2^-52.
_MILLS = 2.0**-47


def log_delta(mu: float, epsilon: float) -> float:
  """Returns an upper bound on log delta of N(mu, 1) against N(0, 1).

  By Balle & Wang 2018 (arXiv:1805.06530); rounding only makes it larger. Delta
  is f(a) (R(a) - R(b)) with f the density of N(0, 1), R its Mills ratio,
  a = epsilon / mu - mu / 2 and b = a + mu. Where the two ratios are nearly
  equal, their difference is at most mu times the mean of -R' at both: R is
  completely monotone, hence so is -R', which is therefore convex.
  """
  low, high = epsilon / mu - mu / 2, epsilon / mu + mu / 2
  rounding = ROUNDING * (4 + (1 + abs(low)) * high)
  if low < -5:  # The two terms do not cancel.
    log = float(special.log_ndtr(-low))
    lost = math.exp(-0.5 * low * low) * _mills(high) / math.sqrt(2 * math.pi)
    return min(log + math.log1p(-lost / math.exp(log)) + rounding, 0.0)
  if not high < 1e6:
    # The second term is negligible.
    return min(float(special.log_ndtr(-low)) + rounding, 0.0)
  near, far = _mills(low), _mills(high)
  values = near - far + _MILLS * (near + far)
  slopes = mu * (1 - (low * near + high * far) / 2)
  slopes += mu * _MILLS * (1 + abs(low) * near + high * far)
  log = math.log(min(values, slopes) / math.sqrt(2 * math.pi))
  return min(log - 0.5 * low * low + rounding, 0.0)


def _mills(x: float) -> float:
  return math.sqrt(math.pi / 2) * float(special.erfcx(x / math.sqrt(2)))
