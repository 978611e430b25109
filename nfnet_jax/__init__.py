"""Normalizer-Free Networks and adaptive gradient clipping in JAX and Haiku.

Brock et al., "High-Performance Large-Scale Image Recognition Without
Normalization" (arXiv 2102.06171).
"""

from __future__ import annotations

from nfnet_jax.models.bn_nfnet import BNNFNet
from nfnet_jax.models.bn_resnet import BNResNet, ResNetV1
from nfnet_jax.models.classifier import ImageClassifier
from nfnet_jax.models.efficientnet import EfficientNet
from nfnet_jax.models.fixup_resnet import FixUpResNet
from nfnet_jax.models.inputs import normalize_images
from nfnet_jax.models.light_nfnet import LightNFNet
from nfnet_jax.models.nf_regnet import NFRegNet
from nfnet_jax.models.nf_resnet import NFResNet
from nfnet_jax.models.nfnet import NFNet
from nfnet_jax.models.registry import (
  create,
  create_model,
  get_model_spec,
  list_models,
  Model,
  ModelSpec,
  register_model,
)
from nfnet_jax.models.skipinit_resnet import SkipInitResNet
from nfnet_jax.optim.agc import agc, AGCState
from nfnet_jax.optim.groups import Group, group_table, NFNET_GROUPS
from nfnet_jax.optim.recipe import (
  make_optimizer,
  nfnet_sgd,
  warmup_cosine,
  warmup_step_decay,
)
from nfnet_jax.preprocessing import EvalPreprocessing
from nfnet_jax.weights.load import load_weights, predict
from nfnet_jax.weights.network import Weights
from nfnet_jax.weights.save import save_weights

__version__ = '0.1.0'

__all__ = [
  'NFNET_GROUPS',
  'AGCState',
  'BNNFNet',
  'BNResNet',
  'EfficientNet',
  'EvalPreprocessing',
  'FixUpResNet',
  'Group',
  'ImageClassifier',
  'LightNFNet',
  'Model',
  'ModelSpec',
  'NFNet',
  'NFRegNet',
  'NFResNet',
  'ResNetV1',
  'SkipInitResNet',
  'Weights',
  'agc',
  'create',
  'create_model',
  'get_model_spec',
  'group_table',
  'list_models',
  'load_weights',
  'make_optimizer',
  'nfnet_sgd',
  'normalize_images',
  'predict',
  'register_model',
  'save_weights',
  'warmup_cosine',
  'warmup_step_decay',
]
