"""Random weights in place of trained ones, and images to run them on."""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from nfnet_jax import preprocessing
from nfnet_jax.config import steps
from nfnet_jax.models import registry
from nfnet_jax.weights import identify, network
from tests.models import reference

_GOLDEN = pathlib.Path(__file__).parent / 'golden'
# Configurations of runs of the digits, as earlier versions saved them.
OLD_CONFIGS = ('old_run_config.json', 'older_run_config.json')


def randomize(model: registry.Model):
  """Draw parameters and running statistics far from the initial ones."""
  images = jnp.zeros((1, 32, 32, 3))
  init = lambda key: model.init(key, images, False)
  shapes = jax.eval_shape(init, jax.random.key(0))[1]
  # Standardisation takes kernels of any scale.
  kind = {'he_kernels': True} if shapes else {'tiny_kernels': True}
  params = reference.random_params(lambda key: init(key)[0], **kind)
  state = reference.random_state(shapes)
  return jax.tree.map(lambda x: np.asarray(x, np.float32), (params, state))


def random_weights(name: str, *, margin: int = 4, **changes):
  """Return a model of ten classes and its weights."""
  model = registry.create(name, 10)
  params, state = randomize(model)
  fields = {
    'num_classes': 10,
    'options': {},
    'class_names': [f'class {index}' for index in range(10)],
    'preprocessing': preprocessing.EvalPreprocessing(
      32, model.spec.eval_crop, margin
    ),
  }
  return model, network.Weights(params, state, name, **{**fields, **changes})


def decisive(weights: network.Weights) -> network.Weights:
  """Scale the classifier, so that logits differ from image to image."""
  rng = np.random.default_rng(5)
  tones = np.arange(1, 17).reshape(16, 1, 1, 1) / 8
  images = rng.uniform(-2, 2, (16, 32, 32, 3)) * tones
  outputs, _ = jax.jit(weights.create().endpoints, static_argnums=4)(
    weights.params, weights.model_state, None, np.float32(images), False
  )
  mean, std = (f(outputs['features'], axis=0) for f in (np.mean, np.std))
  path = identify.classifier_path(weights.params)
  kernel = weights.params[path]['w'] / (std[:, None] + 1e-6)
  head = {'w': np.float32(kernel), 'b': np.float32(-mean @ kernel)}
  return dataclasses.replace(weights, params={**weights.params, path: head})


def draw_photo(path: pathlib.Path) -> None:
  """Write a smooth picture, wider than high."""
  y, x = np.mgrid[:90, :140] / 20
  waves = [np.sin(x * (k + 1) + y * (3 - k) + k) for k in range(3)]
  pixels = np.uint8(127.5 + 120 * np.stack(waves, -1))
  Image.fromarray(pixels).save(path, quality=98)


def write_photos(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
  """Write pictures that networks can tell apart, in several formats."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(count)
  paths = []
  for index in range(count):
    path = folder / f'{index:02}.{("png", "bmp", "tiff")[index % 3]}'
    shape = (30 + index, 45 - index, 3)
    pixels = rng.integers(0, 256, shape) * (index + 1) // count
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    paths.append(path)
  return paths


def write_run(
  workdir: pathlib.Path, weights: network.Weights, old_config: str | None = None
) -> None:
  """Write a run of the digits whose EMA are these weights.

  Args:
    workdir: a folder that is made if it does not exist.
    weights: the network.
    old_config: one of `OLD_CONFIGS`, if the run is one of `nfnet_pico` that was
      saved by an earlier version.
  """
  if old_config:
    workdir.mkdir(parents=True, exist_ok=True)
    shutil.copy(_GOLDEN / old_config, workdir / 'config.json')
  else:
    _write_config(workdir, weights)
  _write_checkpoint(workdir, weights)


def _write_config(workdir: pathlib.Path, weights: network.Weights) -> None:
  from nfnet_jax.config import workdir as workdir_lib
  from nfnet_jax.experiments.configs import digits

  config = digits.get_config()
  config.model.name = weights.model
  config.data.eval_size = weights.preprocessing.size
  config.data.eval_crop = weights.preprocessing.crop
  config.data.eval_margin = weights.preprocessing.margin
  config = steps.prepare_config(config)
  workdir_lib.save(config, workdir, weights.class_names)


def _write_checkpoint(workdir: pathlib.Path, weights: network.Weights) -> None:
  from nfnet_jax.training import checkpoint, state

  raw = jax.tree.map(np.zeros_like, weights.params)
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    checkpoints.save(
      state.TrainState(
        step=np.int32(1),
        params=raw,
        model_state=weights.model_state,
        opt_state={'trace': raw},
        ema_params=weights.params,
        ema_model_state=weights.model_state,
      )
    )
