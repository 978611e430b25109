"""Models of a few layers, which compile in about a second."""

import dataclasses

import haiku as hk
import jax.numpy as jnp

from nfnet_jax.models import (
  batch_norm,
  classifier,
  layers,
  normalizer_free,
  registry,
)

CLASSES = 16  # Eight devices can shard them.
_CHANNELS = 16


def from_features(make_features):
  """Make a model of a linear classifier on features.

  Args:
    make_features: makes the modules, and returns the function from images,
      `is_training` and positions to features `[N, C]`.
  """

  def make():
    extract, linear = make_features(), hk.Linear(CLASSES, name='linear')

    def endpoints(images, is_training, positions=None):
      features = extract(images, is_training, positions)
      return {'features': features, 'logits': linear(features)}

    def forward(*args):
      return endpoints(*args)['logits']

    return forward, (forward, endpoints)

  return _transform(make)


def linear():
  """Make a linear classifier of the mean colour."""
  return from_features(lambda: lambda images, *_: jnp.mean(images, (1, 2)))


def normalised(**options):
  """Make a model with a batch normalisation between two linear layers."""

  def make_features():
    first, norm = hk.Linear(8, name='first'), batch_norm.BatchNorm(**options)

    def extract(images, is_training, positions):
      x = first(jnp.mean(images, (1, 2)))[:, None, None]
      return norm(x, is_training)[:, 0, 0]

    return extract

  return from_features(make_features)


def noisy():
  """Make a model with random draws between two linear layers."""

  def make_features():
    first = hk.Linear(8, name='first')

    def extract(images, is_training, positions):
      x = first(jnp.mean(images, (1, 2)))[:, None, None]
      if is_training:
        key = hk.next_rng_key()
        x = layers.stochastic_depth(x, 0.4, key, positions)
      x = x[:, 0, 0]
      if is_training:
        x = layers.dropout(x, 0.4, hk.next_rng_key(), positions)
      return x

    return extract

  return from_features(make_features)


def residual(num_classes=10, **options):
  """Make a normalizer-free network of two small residual blocks."""

  def make():
    module = _Net(num_classes, **options)
    return module, (module, module.endpoints)

  return _transform(make)


def _transform(make):
  net = hk.multi_transform_with_state(make)
  return registry.Model(net.init, *net.apply, spec=None)


@dataclasses.dataclass(frozen=True)
class _Variant:
  dropout: float = 0.0


class _Block(normalizer_free.NormalizerFreeBlock):
  def __init__(self, **options):
    super().__init__(
      activation=layers.scaled_activation('gelu'),
      is_transition=False,
      **options,
    )
    self.convs = [layers.ScaledWSConv2D(_CHANNELS, 3, name='conv')]
    self.squeeze_excite = layers.optional_squeeze_excite(_CHANNELS, 0.5)


class _Net(classifier.ImageClassifier):
  variants = {'small': _Variant()}
  depth = (2,)

  def __init__(self, num_classes, *, stochdepth_rate=0.0, dropout_rate=0.0):
    super().__init__(
      num_classes,
      'small',
      dropout_rate=dropout_rate,
      w_init=hk.initializers.RandomNormal(0.25),
      name='Net',
    )
    self.conv = layers.ScaledWSConv2D(_CHANNELS, 3, stride=2, name='stem')
    betas = normalizer_free.betas(self.depth, alpha=0.2)
    self.blocks = [
      _Block(
        alpha=0.2,
        beta=beta,
        stochdepth_rate=stochdepth_rate,
        # Not zero, so that branches and random draws have an effect.
        skip_gain=1.0,
        name=f'block_{index}',
      )
      for index, beta in enumerate(betas)
    ]

  def stem(self, images, is_training):
    return self.conv(images)

  def head(self, x, is_training):
    return x
