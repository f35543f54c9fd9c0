"""Secrets, and the named streams of randomness that come from them."""

from dpdist.keys.keys import load_or_create_secret as load_or_create_secret
