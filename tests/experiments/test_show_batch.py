"""The command that draws the network's inputs."""

import numpy as np
from PIL import Image
import pytest

from nfnet_jax import plotting
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.experiments import show_batch


@pytest.fixture
def titles(monkeypatch):
  """The titles of the figures that are saved, a list for each figure."""
  found, save = [], plotting.save

  def record(figure, *args, **options):
    found.append([axis.get_title() for axis in figure.axes])
    save(figure, *args, **options)

  monkeypatch.setattr(plotting, 'save', record)
  return found


def test_contact_sheets(
  run_command, small_recipe, small_imagenet, tmp_path, monkeypatch, titles
):
  stream = experiment_lib.Experiment.train_batches

  def relabelled(self, *args):
    for batch in stream(self, *args):
      label, weight = batch['label'].copy(), batch['weight'].copy()
      label[:3] = [[0, 1], [1, 0], [2, 2]]
      weight[:3] = [[0.25, 0.75], [1, 0], [0.3, 0.7]]
      yield {**batch, 'label': label, 'weight': weight}

  monkeypatch.setattr(experiment_lib.Experiment, 'train_batches', relabelled)
  code, out, err = run_command(
    show_batch.main,
    *small_recipe,
    f'--out={tmp_path}/new',
    '--images=11',
    '--config.data.multiplicity=2',  # Batches are multiples of four then.
    '--config.run.fast_paths=fast_stem',  # It takes images in blocks.
  )
  assert (code, err) == (0, '')
  paths = [tmp_path / 'new' / name for name in ('train.png', 'eval.png')]
  assert out.split() == [str(path) for path in paths]
  for path in paths:
    pixels = np.asarray(Image.open(path))
    assert pixels.shape[0] > 300
    assert len(np.unique(pixels)) > 200  # More than axes and text.
  train, evaluation = titles
  names = small_imagenet.class_names
  a, b, c = names[:3]
  assert train[:3] == [f'{a} 0.25\n{b} 0.75', b, f'{c} 0.30\n{c} 0.70']
  assert set(evaluation) - {''} <= set(names)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.dataset=no_such', 'TFDS knows no dataset'),
    ('--images=2', 'images'),
    ('--out=/dev/null/sheets', "--out='/dev/null/sheets': Not a directory."),
  ],
)
def test_bad_input(
  run_command, small_recipe, tmp_path, monkeypatch, flag, message
):
  monkeypatch.delattr(experiment_lib.Experiment, 'train_batches')
  code, _, err = run_command(
    show_batch.main, *small_recipe, f'--out={tmp_path}', flag
  )
  assert code == 2
  assert message in err
