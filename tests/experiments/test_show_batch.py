"""The command that draws the network's inputs."""

import numpy as np
from PIL import Image
import pytest

from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.experiments import show_batch


def test_contact_sheets(run_command, small_recipe, tmp_path):
  code, out, err = run_command(
    show_batch.main,
    *small_recipe,
    f'--out={tmp_path}/new',
    '--images=12',
    '--config.run.fast_paths=fast_stem',  # It takes images in blocks.
  )
  assert (code, err) == (0, '')
  paths = [tmp_path / 'new' / name for name in ('train.png', 'eval.png')]
  assert out.split() == [str(path) for path in paths]
  for path in paths:
    pixels = np.asarray(Image.open(path))
    assert pixels.shape[0] > 300
    assert len(np.unique(pixels)) > 200  # More than axes and text.


def test_titles_name_classes_with_their_weights():
  batch = {
    'label': np.array([[0, 1], [1, 0], [2, 2]]),
    'weight': np.array([[0.25, 0.75], [1, 0], [0.3, 0.7]]),
  }
  titles = show_batch._titles(batch, ['cat', 'dog', 'cow'])
  assert titles == ['cat 0.25 + dog 0.75', 'dog', 'cow 0.30 + cow 0.70']


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
