"""Normalizer-Free Networks and adaptive gradient clipping in JAX and Haiku.

Brock et al., "High-Performance Large-Scale Image Recognition Without
Normalization" (arXiv 2102.06171).
"""

from nfnet_jax.models.nfnet import NFNet
from nfnet_jax.models.registry import create, list_models
from nfnet_jax.optim.agc import agc, AGCState
from nfnet_jax.optim.recipe import nfnet_sgd, warmup_cosine
from nfnet_jax.weights.load import load_weights, Weights
from nfnet_jax.weights.save import save_weights

__version__ = '0.1.0'

__all__ = [
  'AGCState',
  'NFNet',
  'Weights',
  'agc',
  'create',
  'list_models',
  'load_weights',
  'nfnet_sgd',
  'save_weights',
  'warmup_cosine',
]
