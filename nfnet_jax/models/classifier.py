"""The base class of all families: from images to logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import haiku as hk
import jax
import jax.numpy as jnp

from nfnet_jax.models import layers, residual

# Options that act in training only; trained weights do not depend on them.
REGULARIZATION = ('stochdepth_rate', 'dropout_rate')


class ImageClassifier(hk.Module):
  """A stem, residual blocks, a head and a linear classifier.

  A family is a subclass with
  - a constructor `(num_classes, variant, *, options..., name)`. Its
    keyword-only arguments are the model's options: each has a default, the type
    bool, int, float or str (or one of these and None), and a line under "Args:"
    of the docstring, whose first sentence describes it to users. The default of
    `name` is the root of all parameter paths;
  - the class attributes below whose defaults do not apply;
  - `depth` and `blocks`, which the constructor sets, and the methods `stem` and
    `head`.
  `registry.FAMILIES` has one entry per family of this package. Other code
  registers its models with `registry.register_model`.

  Attributes:
    variants: variant name -> a row with `train_size` and `test_size` (pixels a
      side), `dropout` (rate) and, where published, `augment_magnitude`.
    uses_batch_statistics: whether batches are normalised in training.
    eval_crop: crop of published evaluations, 'squash' or 'centre'; see
      `preprocessing.EvalPreprocessing`.
    eval_margin: pixels that it cuts off.
    published_top1: source -> variant -> ImageNet top-1 in percent.
    standardizes_as_published: whether its standardised kernels are those of
      `layers.standardize`, which the sharded update computes.
    depth: blocks per stage, from fine to coarse.
    blocks: the residual blocks, in order.
    dropout_rate: rate on the pooled features.
    classifier: maps the pooled features to logits.
  """

  variants: ClassVar[Mapping[str, Any]]
  uses_batch_statistics: ClassVar[bool] = False
  eval_crop: ClassVar[str] = 'centre'
  eval_margin: ClassVar[int] = 32
  published_top1: ClassVar[Mapping[str, Mapping[str, float]]] = {}
  standardizes_as_published: ClassVar[bool] = True

  depth: Sequence[int]
  blocks: Sequence[residual.ResidualBlock]

  def __init__(
    self,
    num_classes: int,
    variant: str,
    *,
    dropout_rate: float | None,
    w_init: hk.initializers.Initializer,
    name: str,
  ):
    """Create what all families have.

    Args:
      num_classes: size of the logits.
      variant: a key of `variants`.
      dropout_rate: rate on the pooled features; None takes the variant's.
      w_init: initializer of the classifier's kernel.
      name: root of all parameter paths.

    Raises:
      ValueError: if the variant is unknown; the message lists the known ones.
    """
    super().__init__(name=name)
    if variant not in self.variants:
      raise ValueError(
        f"{type(self).__name__} has no variant '{variant}'. Its variants are "
        f'{", ".join(self.variants)}.'
      )
    if dropout_rate is None:
      dropout_rate = self.variants[variant].dropout
    self.dropout_rate: float = dropout_rate
    self.classifier = hk.Linear(num_classes, w_init=w_init, name='linear')

  @classmethod
  def expected_variance(cls, variant: str) -> list[float] | None:
    """Return the variance after each block at initialisation, if known.

    Skip gains are taken as 1 and options as their defaults.
    """
    return None

  def stem(self, images: jax.Array, is_training: bool) -> jax.Array:
    """Map images to the first block's input."""
    raise NotImplementedError

  def head(self, x: jax.Array, is_training: bool) -> jax.Array:
    """Map the last block's output to what is averaged into features."""
    raise NotImplementedError

  def __call__(
    self,
    images: jax.Array,
    is_training: bool,
    positions: jax.Array | None = None,
    remat: bool = False,
  ) -> jax.Array:
    """Map normalised images `[N, H, W, 3]` to logits `[N, num_classes]`.

    Args:
      images: float images; see `inputs.normalize_images`.
      is_training: whether stochastic depth and dropout act, and whether batch
        statistics are used, if the family has any. Only then is a random key
        drawn.
      positions: `[N]`, each example's position in the global batch, from which
        its random draws derive; 0 to N - 1 by default.
      remat: whether only the blocks' inputs are kept for the backward pass,
        which then computes the blocks again. Values are the same.
    """
    return self.endpoints(images, is_training, positions, remat)['logits']

  def endpoints(
    self,
    images: jax.Array,
    is_training: bool,
    positions: jax.Array | None = None,
    remat: bool = False,
  ) -> dict[str, Any]:
    """Return intermediate statistics, the features and the logits.

    Returns:
      A dict with `block_0`, `block_1`, ... (each a dict of `sq_mean` and `var`
      of the block's output and `residual_var` of its branch before it is scaled
      and added), `features [N, channels]` (pooled, before dropout) and
      `logits`.
    """
    key = hk.next_rng_key() if is_training else None
    if positions is None:
      positions = jnp.arange(images.shape[0])
    outputs: dict[str, Any] = {}
    x = self.stem(images, is_training)
    stages = [i for i, blocks in enumerate(self.depth) for _ in range(blocks)]
    for index, (stage, block) in enumerate(
      zip(stages, self.blocks, strict=True)
    ):
      block_key = None if key is None else jax.random.fold_in(key, index)
      # Profiles and plans show this name.
      with jax.named_scope(f'stage_{stage}'):
        run = hk.remat(block) if remat else block
        x, residual_var = run(x, block_key, positions)
      outputs[f'block_{index}'] = {
        **layers.signal_statistics(x),
        'residual_var': residual_var,
      }
    features = jnp.mean(self.head(x, is_training), axis=(1, 2))
    outputs['features'] = features
    if key is not None:
      dropout_key = jax.random.fold_in(key, len(self.blocks))
      features = layers.dropout(
        features, self.dropout_rate, dropout_key, positions
      )
    outputs['logits'] = self.classifier(features)
    return outputs
