"""The commands that write features, and weights to other files."""

import pickle

import jax
import numpy as np
from PIL import Image
import pytest

import nfnet_jax
from nfnet_jax import images as images_lib
from nfnet_jax import preprocessing
from nfnet_jax.data import pipeline
from nfnet_jax.experiments import convert, features
from nfnet_jax.models import inputs
from nfnet_jax.weights import inference
from tests import trained_weights
from tests.weights import trees


@pytest.fixture(scope='module')
def trained():
  _, weights = trained_weights.random_weights('nfnet_pico', margin=5)
  return trained_weights.decisive(weights)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, trained):
  folder = tmp_path_factory.mktemp('features')
  trained_weights.write_photos(folder / 'photos', 5)
  nfnet_jax.save_weights(folder / 'w.npz', trained)
  return folder


@pytest.fixture
def extract(run_command, folder, tmp_path):
  """Return `extract(*arguments) -> (code, err, arrays or None)`."""

  def extract(*arguments):
    to = tmp_path / 'out.npz'
    code, out, err = run_command(
      features.main,
      f'--weights={folder}/w.npz',
      f'--to={to}',
      *map(str, arguments),
      takes='[IMAGE...]',
    )
    assert out == ''
    if not to.exists():
      return code, err, None
    with np.load(to, allow_pickle=False) as arrays:
      return code, err, dict(arrays)

  return extract


def by_hand(weights, images):
  endpoints = jax.jit(weights.create().endpoints, static_argnums=4)
  outputs, _ = endpoints(
    weights.params,
    weights.model_state,
    None,
    inputs.normalize_images(images),
    False,
  )
  return np.asarray(outputs['features'])


class TestFeatures:
  def test_of_files(self, extract, folder, tmp_path, trained):
    paths = [str(path) for path in sorted((folder / 'photos').iterdir())]
    arguments = [folder / 'photos', paths[0]]
    code, err, arrays = extract(*arguments)
    assert code == 0
    assert err == f'{tmp_path}/out.npz: 6 images of 192 features\n'
    assert set(arrays) == {'features', 'paths'}
    assert arrays['features'].dtype == np.float32
    assert arrays['paths'].tolist() == [*paths, paths[0]]
    images = np.stack(
      [
        item.image
        for item in images_lib.prepare(
          paths, preprocessing.EvalPreprocessing(32, 'squash', 5)
        )
      ]
    )
    expected = by_hand(trained, images)
    assert expected.std(0).max() > 1e-3
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    np.testing.assert_allclose(
      arrays['features'], [*expected, expected[0]], rtol=1e-3, atol=1e-5
    )

  def test_of_a_dataset(self, extract, folder, digits, data_dir, trained):
    # 37 images: a batch and a part.
    code, err, arrays = extract(
      '--dataset=digits', '--split=test[:37]', f'--data_dir={data_dir}'
    )
    assert code == 0, err
    assert set(arrays) == {'features', 'labels'}
    assert arrays['features'].shape == (37, 192)
    (batch,) = pipeline.eval_batches(
      digits,
      'test[:37]',
      batch_size=37,
      preprocessing=preprocessing.EvalPreprocessing(32, 'squash', margin=5),
    )
    assert arrays['labels'].tolist() == batch['label'].tolist()
    np.testing.assert_allclose(
      arrays['features'], by_hand(trained, batch['image']), rtol=1e-3, atol=1e-5
    )

  @pytest.mark.slow
  def test_batches_agree(self, extract, folder):
    """Five images, seven times: more than a batch holds."""
    _, _, few = extract(folder / 'photos')
    _, _, many = extract(*7 * [folder / 'photos'])
    assert many['paths'].tolist() == 7 * few['paths'].tolist()
    np.testing.assert_allclose(
      many['features'], np.tile(few['features'], (7, 1)), rtol=1e-3, atol=1e-5
    )

  @pytest.mark.slow
  @pytest.mark.parametrize('config', trained_weights.OLD_CONFIGS)
  def test_of_an_old_run(self, extract, folder, tmp_path, trained, config):
    trained_weights.write_run(tmp_path / 'run', trained, config)
    path = str(folder / 'photos' / '03.png')
    code, err, arrays = extract(path, f'--weights={tmp_path}/run')
    assert code == 0, err
    weights = nfnet_jax.load_weights(tmp_path / 'run')
    assert weights.preprocessing.margin == 0
    (item,) = images_lib.prepare([path], weights.preprocessing)
    expected = by_hand(weights, item.image[None])
    np.testing.assert_allclose(
      arrays['features'], expected, rtol=1e-3, atol=1e-5
    )

  @pytest.mark.slow
  def test_size(self, extract, folder, trained):
    path = str(folder / 'photos' / '03.png')
    _, _, arrays = extract(path, '--size=48')
    (item,) = images_lib.prepare(
      [path], preprocessing.EvalPreprocessing(48, 'squash', 5)
    )
    expected = by_hand(trained, item.image[None])
    np.testing.assert_allclose(
      arrays['features'], expected, rtol=1e-3, atol=1e-5
    )

  def test_timm_forward(self, extract, folder):
    photo = folder / 'photos' / '03.png'
    _, _, usual = extract(photo)
    code, _, arrays = extract(photo, '--timm_forward')
    assert code == 0
    assert np.abs(arrays['features'] - usual['features']).max() > 1e-3

  def test_unreadable_files_are_left_out(self, extract, folder, tmp_path):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'no')
    first, second = sorted((folder / 'photos').iterdir())[:2]
    code, err, arrays = extract(first, bad, second)
    assert code == 1
    assert err.splitlines() == [
      f'{tmp_path}/out.npz: 2 images of 192 features',
      f'nfnet_jax: {bad} cannot be read: no format that Pillow knows',
    ]
    assert arrays['paths'].tolist() == [str(first), str(second)]
    assert len(arrays['features']) == 2

  def test_no_file_can_be_read(self, extract, tmp_path):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'no')
    code, err, arrays = extract(bad)
    assert (code, arrays) == (2, None)
    assert err == (
      'nfnet_jax: No image could be read: no format that Pillow knows.\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ['bad.png']

  @pytest.mark.parametrize(
    ('arguments', 'message'),
    [
      ([], 'Name images, or a --dataset; not both.'),
      (['{photo}', '--dataset=digits'], 'Name images, or a --dataset'),
      (['{photo}', '--to='], '--to=FILE.'),
      (['{photo}', '--to=a.npy'], "--to='a.npy' must end in .npz."),
      (['{photo}', '--to={tmp}/no/a.npz'], 'there is no such folder'),
      (['{tmp}/none.jpg'], "There is no image or folder '{tmp}/none.jpg'."),
      (
        ['{photo}', '--weights={tmp}/none'],
        "There are no weights '{tmp}/none'",
      ),
    ],
  )
  def test_bad_input(
    self, extract, folder, tmp_path, monkeypatch, arguments, message
  ):
    monkeypatch.setattr(inference, 'Predictor', None)  # Before any work.
    places = {'tmp': tmp_path, 'photo': folder / 'photos' / '00.png'}
    code, err, arrays = extract(*(word.format(**places) for word in arguments))
    assert (code, arrays) == (2, None)
    assert len(err.splitlines()) == 1
    assert message.format(**places) in err
    assert not list(tmp_path.iterdir())

  @pytest.mark.parametrize(
    ('flags', 'message'),
    [
      (['--dataset=digitz'], "TFDS knows no dataset 'digitz'"),
      (['--dataset=digits', '--split=dev'], "no split 'dev'"),
      (
        ['--dataset=digits', '--split=test[:0]'],
        "--split='test[:0]' has 0 examples.",
      ),
    ],
  )
  def test_bad_datasets(
    self, extract, digits, data_dir, tmp_path, flags, message
  ):
    code, err, arrays = extract(*flags, f'--data_dir={data_dir}')
    assert (code, arrays) == (2, None)
    assert len(err.splitlines()) == 1, err
    assert message in err
    assert not list(tmp_path.iterdir())

  def test_a_file_that_cannot_be_written(self, extract, folder, tmp_path):
    (tmp_path / 'there.npz').mkdir()
    photo = folder / 'photos' / '03.png'
    code, err, _ = extract(photo, f'--to={tmp_path}/there.npz')
    assert code == 2
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['there.npz']

  def test_a_record_that_cannot_be_used(self, extract, tmp_path):
    (tmp_path / 'data' / 'a').mkdir(parents=True)
    Image.new('RGB', (9, 9)).save(tmp_path / 'data' / 'a' / '0.png')
    (tmp_path / 'data' / 'a' / '1.png').write_bytes(b'no')
    code, err, arrays = extract(f'--dataset={tmp_path}/data')
    assert (code, arrays) == (2, None)
    assert '1.png: the image cannot be decoded. Repair the dataset.\n' in err


class TestConvert:
  def run(self, run_command, *arguments):
    return run_command(convert.main, *map(str, arguments))

  @pytest.mark.parametrize('layout', ['haiku', 'timm'])
  @pytest.mark.parametrize('ending', ['npz', 'safetensors'])
  def test_round_trip(
    self, run_command, folder, tmp_path, trained, ending, layout
  ):
    to = tmp_path / f'a.{ending}'
    flags = f'--weights={folder}/w.npz', f'--to={to}', f'--layout={layout}'
    code, out, err = self.run(run_command, *flags)
    assert (code, err) == (0, '')
    assert out == f'{to}: nfnet_pico, 91,802 parameters\n'
    back = tmp_path / 'back.npz'
    assert self.run(run_command, f'--weights={to}', f'--to={back}')[0] == 0
    for path in (to, back):
      weights = nfnet_jax.load_weights(path)
      trees.assert_equal(weights.params, trained.params)
      assert weights.metadata() == trained.metadata()
    with np.load(back, allow_pickle=False) as arrays:
      assert {
        name.split('/')[0] for name in arrays.files if name != 'nfnet_jax'
      } == {'params'}
    if ending == 'safetensors':
      import safetensors.numpy

      names = set(safetensors.numpy.load_file(to))
      assert ('head.fc.weight' in names) == (layout == 'timm')

  @pytest.mark.parametrize('ending', ['npz', 'safetensors'])
  def test_running_statistics(self, run_command, tmp_path, ending):
    _, weights = trained_weights.random_weights('bn_resnet_pico')
    nfnet_jax.save_weights(tmp_path / 'bn.npz', weights)
    to = tmp_path / f'to.{ending}'
    flags = f'--weights={tmp_path}/bn.npz', f'--to={to}'
    assert self.run(run_command, *flags)[0] == 0
    loaded = nfnet_jax.load_weights(to)
    trees.assert_equal(loaded.model_state, weights.model_state)
    trees.assert_equal(loaded.params, weights.params)

  def test_published_file(self, run_command, tmp_path):
    params, _ = trees.filled(num_classes=1000)
    (tmp_path / 'F0_haiku.npz').write_bytes(pickle.dumps(params, 4))
    to = tmp_path / 'plain.npz'
    flags = f'--weights={tmp_path}/F0_haiku.npz', f'--to={to}'
    assert self.run(run_command, *flags)[0] == 0
    loaded = nfnet_jax.load_weights(to)
    trees.assert_equal(loaded.params, params)
    assert (loaded.class_names[0], loaded.preprocessing.size) == ('tench', 32)

  def test_size(self, run_command, folder, tmp_path):
    to = tmp_path / 'a.npz'
    flags = f'--weights={folder}/w.npz', f'--to={to}', '--size=64'
    code, _, _ = self.run(run_command, *flags)
    assert code == 0
    assert nfnet_jax.load_weights(to).preprocessing.size == 64

  @pytest.mark.parametrize(
    ('flags', 'message'),
    [
      (['--to=a.npz'], '--weights=PATH.'),
      (['{w}'], '--to=FILE.'),
      (['{w}', '--to={tmp}/a.pkl'], "'{tmp}/a.pkl' must end in .npz or .saf"),
      (['{w}', '--to={tmp}/a'], 'must end in .npz or .safetensors'),
      (['{w}', '--to={tmp}/no/a.npz'], "'{tmp}/no/a.npz': there is no such fo"),
      (['{w}', '--to={tmp}/a.npz', '--layout=flax'], 'value should be one of'),
      (['--weights={tmp}/no', '--to={tmp}/a.npz'], "no weights '{tmp}/no'"),
      (['{w}', '--to={tmp}/a.npz', 'extra'], "Unexpected argument 'extra'"),
    ],
  )
  def test_bad_input(self, run_command, folder, tmp_path, flags, message):
    places = {'tmp': tmp_path, 'w': f'--weights={folder}/w.npz'}
    code, out, err = self.run(
      run_command, *(flag.format(**places) for flag in flags)
    )
    assert (code, out) == (2, '')
    assert len(err.splitlines()) == 1
    assert message.format(**places) in err
    assert not list(tmp_path.iterdir())

  @pytest.mark.parametrize('name', ['bn_resnet_pico', 'nf_regnet_pico'])
  def test_layout_of_another_family(self, run_command, tmp_path, name):
    _, weights = trained_weights.random_weights(name)
    nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
    flags = f'--weights={tmp_path}/w.npz', f'--to={tmp_path}/a.npz'
    code, out, err = self.run(run_command, *flags, '--layout=timm')
    assert (code, out) == (2, '')
    assert err == (
      f"nfnet_jax: timm's layout is that of NFNets; '{name}' has none.\n"
    )
    assert not (tmp_path / 'a.npz').exists()

  def test_a_file_that_cannot_be_written(self, run_command, folder, tmp_path):
    (tmp_path / 'a.npz').mkdir()
    flags = f'--weights={folder}/w.npz', f'--to={tmp_path}/a.npz'
    code, out, err = self.run(run_command, *flags)
    assert (code, out) == (2, '')
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['a.npz']
