"""The command that prints what images show."""

import dataclasses
import json
import pickle

import jax
import numpy as np
from PIL import Image
import pytest

import nfnet_jax
from nfnet_jax import images as images_lib
from nfnet_jax import preprocessing
from nfnet_jax.experiments import predict
from nfnet_jax.weights import inference
from tests import trained_weights
from tests.weights import trees

KINDS = ('npz', 'pickle', 'safetensors', 'timm', 'run')
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope='module')
def trained():
  # With the margin that a pickle gets, which has no metadata.
  _, weights = trained_weights.random_weights('nfnet_pico', margin=32)
  return trained_weights.decisive(weights)


@pytest.fixture(scope='module')
def folder(tmp_path_factory, trained):
  """Return a folder with seven photos, and with weights of every kind."""
  folder = tmp_path_factory.mktemp('predict')
  trained_weights.write_photos(folder / 'photos', 7)
  nfnet_jax.save_weights(folder / 'npz.npz', trained)
  nfnet_jax.save_weights(folder / 'safetensors.safetensors', trained)
  nfnet_jax.save_weights(folder / 'timm.safetensors', trained, 'timm')
  (folder / 'pickle.npz').write_bytes(pickle.dumps(trained.params, 4))
  trained_weights.write_run(folder / 'run', trained)
  return folder


def flag(folder, kind='npz'):
  (path,) = folder.glob(f'{kind}*')
  return f'--weights={path}'


@pytest.fixture
def ask(run_command, folder):
  """Return `ask(*arguments, kind='npz') -> (code, out, err)`."""

  def ask(*arguments, kind='npz'):
    arguments = [str(argument) for argument in arguments]
    flags = [] if kind is None else [flag(folder, kind)]
    return run_command(predict.main, *flags, *arguments, takes='IMAGE...')

  return ask


@pytest.fixture
def ask_json(ask):
  def ask_json(*arguments, code=0, **options):
    got, out, err = ask(*arguments, '--json', **options)
    assert got == code, err
    assert len(out.splitlines()) == 1
    return json.loads(out)

  return ask_json


def by_hand(weights, paths):
  """Compute probabilities with the model, one image at a time."""
  run = jax.jit(weights.create().apply, static_argnums=4)
  rows = []
  for prepared in images_lib.prepare(
    [str(path) for path in paths], weights.preprocessing
  ):
    image = (prepared.image / 255 - np.array(MEAN)) / np.array(STD)
    logits, _ = run(
      weights.params,
      weights.model_state,
      None,
      np.float32(image[None]),
      False,
    )
    logits = np.float64(logits[0])
    rows.append(np.exp(logits - logits.max()))
  return np.stack([row / row.sum() for row in rows])


def assert_predicts(images, paths, probabilities, names):
  assert [row['path'] for row in images] == [str(path) for path in paths]
  for row, expected in zip(images, probabilities):
    order = np.argsort(-expected)[:5]
    assert [guess['class'] for guess in row['top5']] == order.tolist()
    assert [guess['name'] for guess in row['top5']] == [
      names[index] for index in order
    ]
    got = [guess['probability'] for guess in row['top5']]
    np.testing.assert_allclose(got, expected[order], rtol=1e-3, atol=1e-6)
    assert got == sorted(got, reverse=True)


def test_predictions_of_the_model(ask_json, folder, trained):
  result = ask_json(folder / 'photos')
  assert list(result) == ['model', 'images', 'unreadable']
  assert (result['model'], result['unreadable']) == ('nfnet_pico', [])
  assert set(result['images'][0]) == {'path', 'top5'}
  assert set(result['images'][0]['top5'][0]) == {'class', 'name', 'probability'}
  paths = sorted((folder / 'photos').iterdir())
  probabilities = by_hand(trained, paths)
  assert len(set(probabilities.argmax(1))) > 2, 'Photos must differ.'
  assert_predicts(result['images'], paths, probabilities, trained.class_names)


@pytest.mark.parametrize(
  'kind',
  ['pickle', *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[2:])],
)
def test_kinds_of_weights_agree(ask_json, folder, kind):
  assert ask_json(folder / 'photos', kind=kind) == ask_json(folder / 'photos')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('config', 'options'),
  list(zip(trained_weights.OLD_CONFIGS, ({'activation': 'relu'}, {}))),
)
def test_old_runs(ask_json, folder, tmp_path, trained, config, options):
  trained_weights.write_run(tmp_path / 'run', trained, config)
  same = dataclasses.replace(
    trained,
    options=options,
    preprocessing=preprocessing.EvalPreprocessing(32, 'squash', margin=0),
  )
  nfnet_jax.save_weights(tmp_path / 'same.npz', same)
  photos = sorted((folder / 'photos').iterdir())[4:6]
  result = ask_json(f'--weights={tmp_path}/run', *photos, kind=None)
  assert result == ask_json(
    f'--weights={tmp_path}/same.npz', *photos, kind=None
  )
  assert result != ask_json(*photos)


@pytest.mark.slow
@pytest.mark.parametrize('size', [1, 3])
def test_batch_sizes_agree(ask_json, folder, size):
  split = ask_json(folder / 'photos', f'--batch_size={size}')
  whole = ask_json(folder / 'photos')
  for ours, theirs in zip(split['images'], whole['images'], strict=True):
    assert ours['path'] == theirs['path']
    for guess, other in zip(ours['top5'], theirs['top5'], strict=True):
      assert guess['class'] == other['class']
      assert guess['probability'] == pytest.approx(
        other['probability'], rel=2e-3, abs=1e-6
      )


def test_one_program_is_compiled(trained):
  compiled = []

  def record(event, duration, **details):
    del duration
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(details.get('fun_name', ''))

  predictor = inference.Predictor(trained)
  images = np.random.default_rng(0).uniform(0, 255, (3, 32, 32, 3))
  images = np.float32(images)
  jax.monitoring.register_event_duration_secs_listener(record)
  whole = predictor(images, 3)
  assert whole['features'].shape == (3, 192)
  assert whole['probabilities'].shape == (3, 10)
  np.testing.assert_allclose(whole['probabilities'].sum(1), 1, rtol=1e-5)
  for count in (1, 2):
    part = predictor(images[:count], 3)
    for name, value in part.items():
      assert len(value) == count
      np.testing.assert_array_equal(value, whole[name][:count])
  jax.monitoring.unregister_event_duration_listener(record)
  assert len(compiled) == 1


def test_table(ask, folder):
  code, out, err = ask(folder / 'photos', folder / 'photos' / '00.png')
  assert (code, err) == (0, '')
  blocks = out.split(str(folder))[1:]
  assert len(blocks) == 8
  assert blocks[0] == blocks[-1]
  path, *lines = blocks[0].splitlines()
  assert path == '/photos/00.png'
  assert len(lines) == 5
  shares = [float(line.split(' %  ')[0]) for line in lines]
  assert shares == sorted(shares, reverse=True)
  assert 10 < sum(shares) <= 100.05
  assert all(' %  class ' in line for line in lines)


@pytest.mark.parametrize('count', [pytest.param(1, marks=pytest.mark.slow), 3])
def test_fewer_than_five_classes(ask_json, folder, tmp_path, trained, count):
  head = trained.params['NFNet/~/linear']
  few = {name: array[..., :count] for name, array in head.items()}
  weights = dataclasses.replace(
    trained,
    params={**trained.params, 'NFNet/~/linear': few},
    num_classes=count,
    class_names=['Bär', 'cat', '狗'][:count],
  )
  nfnet_jax.save_weights(tmp_path / 'few.npz', weights)
  path = folder / 'photos' / '03.png'
  result = ask_json(f'--weights={tmp_path}/few.npz', path, kind=None)
  top = result['images'][0]['top5']
  assert len(top) == count
  assert sum(guess['probability'] for guess in top) == pytest.approx(1)
  assert_predicts(
    result['images'], [path], by_hand(weights, [path]), weights.class_names
  )


@pytest.mark.slow
def test_published_classes_have_names_in_words(ask_json, folder, tmp_path):
  params, _ = trees.filled(num_classes=1000)
  (tmp_path / 'F0_haiku.npz').write_bytes(pickle.dumps(params, 4))
  photo = folder / 'photos' / '00.png'
  weights = f'--weights={tmp_path}/F0_haiku.npz'
  (row,) = ask_json(weights, photo, kind=None)['images']
  assert all(
    nfnet_jax.load_weights(tmp_path / 'F0_haiku.npz').class_names[
      guess['class']
    ]
    == guess['name']
    and not guess['name'].startswith(('class', 'n0'))
    for guess in row['top5']
  )


@pytest.fixture
def damaged(folder, tmp_path):
  """Return a folder with one good image between bad ones."""
  whole = (folder / 'photos' / '00.png').read_bytes()
  (tmp_path / 'bad').mkdir()
  for name, content in (
    ('a.jpg', b'text'),
    ('b.png', whole),
    ('c.png', whole[:300]),
    ('d.gif', b''),
  ):
    (tmp_path / 'bad' / name).write_bytes(content)
  return tmp_path / 'bad'


@pytest.mark.parametrize(
  'size', [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 32))]
)
def test_unreadable_files_are_listed(ask_json, ask, folder, damaged, size):
  flags = damaged, f'--batch_size={size}'
  result = ask_json(*flags, code=1)
  assert [row['path'] for row in result['images']] == [f'{damaged}/b.png']
  bad = result['unreadable']
  assert [row['path'] for row in bad] == [
    f'{damaged}/{name}' for name in ('a.jpg', 'c.png', 'd.gif')
  ]
  assert bad[0]['reason'] == 'no format that Pillow knows'
  assert all(set(row) == {'path', 'reason'} and row['reason'] for row in bad)
  (single,) = ask_json(folder / 'photos' / '00.png')['images']
  (other,) = result['images']
  assert [g['class'] for g in single['top5']] == [
    g['class'] for g in other['top5']
  ]
  code, out, err = ask(*flags)
  assert code == 1
  assert out.startswith(f'{damaged}/b.png\n')
  assert len(out.splitlines()) == 6
  lines = err.splitlines()
  assert lines == [
    f'nfnet_jax: {row["path"]} cannot be read: {row["reason"]}' for row in bad
  ]


def test_no_image_can_be_read(ask_json, ask, damaged, tmp_path):
  result = ask_json(damaged / 'a.jpg', code=1)
  assert result['images'] == []
  assert len(result['unreadable']) == 1
  code, out, err = ask(damaged / 'a.jpg', f'--plot={tmp_path}/plot.png')
  assert (code, out) == (1, '')
  assert len(err.splitlines()) == 1
  assert not (tmp_path / 'plot.png').exists()


@pytest.mark.parametrize('count', [1, pytest.param(7, marks=pytest.mark.slow)])
def test_plot(ask, folder, tmp_path, count):
  plot = tmp_path / 'plot.png'
  photos = sorted((folder / 'photos').iterdir())[:count]
  code, out, err = ask(*photos, f'--plot={plot}')
  assert (code, err.strip()) == (0, str(plot))
  assert len(out.splitlines()) == 6 * count
  assert list(tmp_path.iterdir()) == [plot]
  pixels = np.asarray(Image.open(plot))
  columns, rows = min(3, count), -(-count // 3)
  # Versions of matplotlib round differently.
  assert pixels.shape[:2] == pytest.approx((240 * rows, 640 * columns), abs=1)
  assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 300


def test_plot_of_names_that_look_like_formulas(ask, folder, tmp_path, trained):
  names = ['$x', 'a$_$b', '$\\nope$', '%', *'abcdef']
  weights = dataclasses.replace(trained, class_names=names)
  nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
  photo = tmp_path / '$5_$6 $\\no$.png'
  photo.write_bytes((folder / 'photos' / '03.png').read_bytes())
  plot = tmp_path / 'plot.png'
  flags = f'--weights={tmp_path}/w.npz', f'--plot={plot}', photo
  code, _, err = ask(*flags, kind=None)
  assert code == 0, err
  assert plot.exists()


@pytest.mark.slow
def test_plot_holds_the_first_images_only(ask, folder, tmp_path):
  plot = tmp_path / 'plot.png'
  code, out, _ = ask(*4 * [folder / 'photos'], f'--plot={plot}')
  assert (code, len(out.splitlines())) == (0, 28 * 6)
  shape = np.asarray(Image.open(plot)).shape
  assert shape[:2] == pytest.approx((8 * 240, 3 * 640), abs=1)


def test_a_name_that_is_not_text(ask, ask_json, folder, tmp_path):
  name = tmp_path.joinpath(b'\xe4.png'.decode(errors='surrogateescape'))
  name.write_bytes((folder / 'photos' / '00.png').read_bytes())
  assert ask_json(tmp_path)['images'][0]['path'] == str(name)
  code, out, _ = ask(tmp_path)
  assert (code, len(out.splitlines())) == (0, 6)
  assert out.encode()  # Any terminal can print it.


@pytest.mark.slow
def test_size(ask_json, folder, trained):
  photo = folder / 'photos' / '06.png'
  larger = dataclasses.replace(
    trained, preprocessing=dataclasses.replace(trained.preprocessing, size=48)
  )
  result = ask_json(photo, '--size=48')
  expected = by_hand(larger, [photo])
  assert_predicts(result['images'], [photo], expected, trained.class_names)
  assert result != ask_json(photo)


@pytest.mark.parametrize(
  ('crop', 'margin'),
  [pytest.param('centre', 4, marks=pytest.mark.slow), ('squash', 0)],
)
def test_preprocessing_is_that_of_the_weights(
  ask_json, folder, tmp_path, trained, crop, margin
):
  other = dataclasses.replace(
    trained, preprocessing=preprocessing.EvalPreprocessing(40, crop, margin)
  )
  nfnet_jax.save_weights(tmp_path / 'w.npz', other)
  photos = sorted((folder / 'photos').iterdir())[4:6]
  result = ask_json(f'--weights={tmp_path}/w.npz', *photos, kind=None)
  expected = by_hand(other, photos)
  assert_predicts(result['images'], photos, expected, trained.class_names)


@pytest.mark.slow
def test_statistics_of_a_batch_normalised_network(ask_json, folder, tmp_path):
  _, weights = trained_weights.random_weights('bn_resnet_pico')
  nfnet_jax.save_weights(tmp_path / 'bn.npz', weights)
  photos = sorted((folder / 'photos').iterdir())[:2]
  result = ask_json(f'--weights={tmp_path}/bn.npz', *photos, kind=None)
  assert result['model'] == 'bn_resnet_pico'
  expected = by_hand(weights, photos)
  assert_predicts(result['images'], photos, expected, weights.class_names)


def test_timm_forward(ask_json, folder, trained):
  photo = folder / 'photos' / '06.png'
  result = ask_json(photo, '--timm_forward')
  expected = by_hand(trained.with_options(timm_forward=True), [photo])
  assert_predicts(result['images'], [photo], expected, trained.class_names)
  assert np.abs(expected - by_hand(trained, [photo])).max() > 1e-3


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'IMAGE... is missing.'),
    (['{tmp}/none.jpg'], "There is no image or folder '{tmp}/none.jpg'."),
    (['{tmp}'], "There are no images in '{tmp}'."),
    (['{photo}', '--plot=out.jpg'], "--plot='out.jpg' must end in .png"),
    (['{photo}', '--plot={tmp}/no/out.png'], 'folder that exists'),
    (['{photo}', '--plot={photo}/out.png'], 'folder that exists'),
    (['{photo}', '--batch_size=0'], '--batch_size=0'),
    (['{photo}', '--size=0'], '--size=0'),
    (['{photo}', '--top=3'], "Unknown command line flag 'top'"),
    (['{photo}', '--weights='], '--weights=PATH.'),
    (
      ['{photo}', '--weights={tmp}/none.npz'],
      "There are no weights '{tmp}/none.npz'.",
    ),
    (['{photo}', '--weights={photo}'], 'cannot be used'),
  ],
)
def test_bad_input(ask, folder, tmp_path, monkeypatch, arguments, message):
  monkeypatch.setattr(inference, 'Predictor', None)  # Before any work.
  places = {'tmp': tmp_path, 'photo': folder / 'photos' / '00.png'}
  code, out, err = ask(*(word.format(**places) for word in arguments))
  assert (code, out) == (2, '')
  assert len(err.splitlines()) == 1
  assert err.startswith('nfnet_jax: ')
  assert message.format(**places) in err


@pytest.mark.parametrize(
  'name',
  ['bn_resnet_pico', pytest.param('nfnet_pico_bn', marks=pytest.mark.slow)],
)
def test_timm_forward_of_another_family(ask, folder, tmp_path, name):
  _, weights = trained_weights.random_weights(name)
  nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
  flags = f'--weights={tmp_path}/w.npz', '--timm_forward'
  code, out, err = ask(*flags, folder / 'photos', kind=None)
  assert (code, out) == (2, '')
  assert err == f"nfnet_jax: '{name}' has no option timm_forward.\n"


def test_equal_probabilities_are_ordered_by_class(
  ask_json, folder, tmp_path, trained
):
  head = 'NFNet/~/linear'
  zeros = jax.tree.map(np.zeros_like, trained.params[head])
  params = {**trained.params, head: zeros}
  weights = dataclasses.replace(trained, params=params)
  nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
  photo = folder / 'photos' / '00.png'
  (row,) = ask_json(f'--weights={tmp_path}/w.npz', photo, kind=None)['images']
  assert [guess['class'] for guess in row['top5']] == [0, 1, 2, 3, 4]


def test_weights_that_give_nan(ask, folder, tmp_path, trained):
  params = jax.tree.map(lambda a: np.full_like(a, np.nan), trained.params)
  weights = dataclasses.replace(trained, params=params)
  nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
  flags = f'--weights={tmp_path}/w.npz', folder / 'photos' / '00.png'
  code, out, err = ask(*flags, '--json', kind=None)
  assert (code, out) == (2, '')
  assert 'The network gives NaN' in err
  assert len(err.splitlines()) == 1
