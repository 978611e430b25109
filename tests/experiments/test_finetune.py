"""Runs that begin with trained weights, and weights evaluated on data."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

import nfnet_jax
from nfnet_jax import preprocessing
from nfnet_jax.cli import summary
from nfnet_jax.config import base, resolve, steps
from nfnet_jax.config import experiment as experiment_lib
from nfnet_jax.config import workdir as workdir_lib
from nfnet_jax.experiments import evaluate, features, predict, train
from nfnet_jax.experiments.configs import digits as digits_config
from nfnet_jax.experiments.configs import finetune, pretrain
from nfnet_jax.training import checkpoint, data_parallel, layouts
from tests import trained_weights
from tests.weights import trees

HEAD = 'NFNet/~/linear'


def with_classes(weights, count):
  """Return the same network with fewer classes."""
  head = {
    name: array[..., :count] for name, array in weights.params[HEAD].items()
  }
  return dataclasses.replace(
    weights,
    params={**weights.params, HEAD: head},
    num_classes=count,
    class_names=weights.class_names[:count],
  )


@pytest.fixture(scope='module')
def trained():
  return trained_weights.random_weights('nfnet_pico')[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, trained):
  folder = tmp_path_factory.mktemp('finetune')
  nfnet_jax.save_weights(folder / 'ten.npz', trained)
  nfnet_jax.save_weights(folder / 'seven.npz', with_classes(trained, 7))
  return folder


def settings(path, data_dir, **model):
  config = finetune.get_config()
  config.dataset = 'digits'
  config.weights = str(path)
  config.batch_size = 16
  config.data.shards = 8
  config.data.eval_split = 'test'
  config.run.data_dir = data_dir
  config.model.update(model)
  return config


def begin(path, source, data_dir, **model):
  config = steps.prepare_config(settings(path, data_dir, **model))
  experiment = experiment_lib.Experiment(config, source)
  return experiment, jax.device_get(experiment.create_state())


class TestFirstState:
  """The state at step 0."""

  def test_same_classes_keep_the_classifier(
    self, folder, digits, data_dir, trained
  ):
    _, state = begin(folder / 'ten.npz', digits, data_dir)
    trees.assert_equal(state.params, trained.params)
    trees.assert_equal(state.ema_params, trained.params)
    assert state.step == 0
    assert not any(
      np.any(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim
    )

  def test_other_classes_initialise_only_the_classifier(
    self, folder, digits, data_dir, trained
  ):
    experiment, state = begin(folder / 'seven.npz', digits, data_dir)
    fresh = base.get_config()
    fresh.update(experiment.config.to_dict())
    fresh.weights = None
    initial = (
      experiment_lib.Experiment(fresh.lock(), digits).create_state().params
    )
    for tree in (state.params, state.ema_params):
      tree = dict(tree)
      head = tree.pop(HEAD)
      assert head['w'].shape == (192, 10)
      trees.assert_equal({HEAD: head}, {HEAD: jax.device_get(initial[HEAD])})
      others = {k: v for k, v in trained.params.items() if k != HEAD}
      trees.assert_equal(tree, others)

  @pytest.mark.slow
  @pytest.mark.parametrize(
    ('name', 'more'),
    [('ten.npz', ''), ('seven.npz', ', classifier new (7 classes there)')],
  )
  def test_the_summary_names_the_weights(
    self, folder, digits, data_dir, name, more
  ):
    config = steps.prepare_config(settings(folder / name, data_dir))
    experiment = experiment_lib.Experiment(config, digits)
    origin = f'weights    {folder}/{name}{more}\n'
    assert origin in summary.summary(experiment)

  def test_a_step_may_donate_the_state(self, folder, digits, data_dir, trained):
    before = jax.tree.map(np.array, trained.params)
    config = settings(folder / 'ten.npz', data_dir)
    config = steps.prepare_config(config)
    state = experiment_lib.Experiment(config, digits).create_state()
    # On one device, where a copy may be left out.
    single = data_parallel.DataParallel(jax.local_devices()[:1])

    def step(state, batch):
      times = lambda factor, tree: jax.tree.map(lambda x: factor * x, tree)
      params, average = times(2, state.params), times(4, state.ema_params)
      return state._replace(params=params, ema_params=average), {}

    batch = single.shard_batch({'image': np.zeros((1, 1), np.float32)})
    trainer = types.SimpleNamespace(train_step=step, layout=layouts.REPLICATED)
    state, _ = single.train_step(trainer)(single.replicate(state), batch)
    for factor, tree in ((2, state.params), (4, state.ema_params)):
      times = lambda x, factor=factor: factor * x
      expected = jax.tree.map(times, before)
      trees.assert_equal(jax.device_get(tree), expected)

  @pytest.mark.parametrize(
    'count', [pytest.param(10, marks=pytest.mark.slow), 7]
  )
  def test_running_statistics_are_carried_over(
    self, tmp_path, digits, data_dir, count
  ):
    _, weights = trained_weights.random_weights('bn_resnet_pico')
    head = {
      leaf: array[..., :count]
      for leaf, array in weights.params['ResNet/~/linear'].items()
    }
    weights = dataclasses.replace(
      weights,
      params={**weights.params, 'ResNet/~/linear': head},
      num_classes=count,
      class_names=weights.class_names[:count],
    )
    nfnet_jax.save_weights(tmp_path / 'bn.npz', weights)
    _, state = begin(tmp_path / 'bn.npz', digits, data_dir)
    trees.assert_equal(state.model_state, weights.model_state)
    trees.assert_equal(state.ema_model_state, weights.model_state)
    assert state.params['ResNet/~/linear']['w'].shape[1] == 10

  def test_a_published_file_is_enough(self, tmp_path, digits, data_dir):
    import pickle

    params, _ = trees.filled(num_classes=1000)
    (tmp_path / 'F0_haiku.npz').write_bytes(pickle.dumps(params, 4))
    _, state = begin(tmp_path / 'F0_haiku.npz', digits, data_dir)
    assert state.params.pop(HEAD)['w'].shape == (192, 10)
    del params[HEAD]
    trees.assert_equal(state.params, params)


class TestSettings:
  def test_name_and_options_are_those_of_the_weights(
    self, tmp_path, trained, data_dir
  ):
    options = {'activation': 'silu', 'timm_forward': True}
    weights = trained.with_options(**options)
    nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
    config = settings(tmp_path / 'w.npz', data_dir)
    model = steps.prepare_config(config).model
    assert model.name == 'nfnet_pico'
    assert (model.activation, model.timm_forward) == ('silu', True)
    assert config.model.name is None  # The argument does not change.
    config.model.activation = 'relu'  # Given explicitly.
    assert steps.prepare_config(config).model.activation == 'relu'

  def test_any_option_of_the_weights_is_taken(
    self, tmp_path, trained, data_dir
  ):
    weights = trained.with_options(alpha=0.3)
    nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
    config = settings(tmp_path / 'w.npz', data_dir)
    assert steps.prepare_config(config).model.alpha == 0.3

  @pytest.mark.parametrize('recipe', ['plain', 'small'])
  def test_images_are_preprocessed_as_for_the_weights(
    self, tmp_path, trained, data_dir, recipe
  ):
    used = preprocessing.EvalPreprocessing(48, 'centre', 3)
    weights = dataclasses.replace(trained, preprocessing=used)
    nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
    config = finetune.get_config(recipe)
    config.dataset, config.run.data_dir = 'digits', data_dir
    config.weights = str(tmp_path / 'w.npz')
    config.data.shards = 8
    config.data.eval_split = '10%'
    begun = steps.prepare_config(config)
    assert (
      base.read_fields(preprocessing.EvalPreprocessing, begun.data, 'eval_')
      == used
    )
    # A run that has begun needs neither the weights nor a second choice.
    workdir_lib.save(begun, tmp_path / 'run', trained.class_names)
    (tmp_path / 'w.npz').unlink()
    again = steps.prepare_config(config, workdir=tmp_path / 'run')
    assert again.to_dict() == begun.to_dict()
    config.data.eval_size = 64
    config.weights = None
    config.model.name = 'nfnet_pico'
    assert steps.prepare_config(config).data.eval_size == 64

  def test_paths_become_absolute(self, folder, data_dir, monkeypatch):
    monkeypatch.chdir(folder)
    config = steps.prepare_config(settings('ten.npz', data_dir))
    assert config.weights == f'{folder}/ten.npz'

  @pytest.mark.slow
  @pytest.mark.parametrize('name', ['ten.npz', 'seven.npz'])
  def test_another_size(self, folder, digits, data_dir, name):
    config = settings(folder / name, data_dir)
    config.data.image_size, config.data.eval_size = 48, 64
    config = steps.prepare_config(config)
    experiment = experiment_lib.Experiment(config, digits)
    state = experiment.create_state()
    assert experiment.abstract_state() == jax.eval_shape(lambda: state)
    batch = next(experiment.train_batches(0, print))
    assert batch['image'].shape == (16, 48, 48, 3)
    assert next(experiment.eval_batches(print))['image'].shape[1] == 64

  def test_native_sizes_otherwise(self, tmp_path, folder, data_dir):
    config = steps.prepare_config(settings(folder / 'ten.npz', data_dir))
    assert (config.data.image_size, config.data.eval_size) == (32, 32)


def published(config):
  """Return the settings that the paper gives for fine-tuning."""
  optimizer, data = config.optimizer, config.data
  return {
    'batch': config.batch_size,
    'length': config.train_for,
    'rate': (optimizer.learning_rate, optimizer.final_learning_rate),
    'warmup': optimizer.warmup,
    'step_decay': optimizer.decay_every,
    'momentum': (optimizer.momentum, optimizer.nesterov),
    'decay': optimizer.weight_decay,
    'sam': (optimizer.sam_rho, optimizer.sam_share),
    'dropout': config.model.dropout_rate,
    'depth': config.model.stochdepth_rate,
    'ema': config.ema_decay,
    'augment': (data.crop, data.flip, data.mixup, data.cutmix),
    'randaugment': data.randaugment_layers,
  }


FINETUNE = {
  'batch': 2048,
  'length': '15000 steps',
  'rate': (0.1, 0.0),
  'warmup': '5000 steps',
  'step_decay': None,
  'momentum': (0.9, True),
  'decay': 0.0,
  'sam': (0.0, 0.2),
  'dropout': 0.0,
  'depth': 0.0,
  'ema': 0.9999,
  'augment': ('distorted', True, False, False),
  'randaugment': 0,
}
SAM = {'decay': 1e-5, 'sam': (0.05, 0.2), 'dropout': 0.25, 'depth': 0.1}
PRETRAIN = {
  'batch': 4096,
  'length': '40 epochs',
  'rate': (1.6, 0.0),
  'warmup': '5 epochs',
  'decay': 1e-6,
  'dropout': None,
  'depth': 0.25,
  'ema': 0.0,
}
FINETUNE_SCALING = {**SAM, 'length': '50 epochs', 'warmup': '5 epochs'}
SCALING = {**PRETRAIN, 'length': '8 epochs', 'warmup': '5000 steps'}
RESNET = {
  'batch': 1024,
  'length': '10 epochs',
  'rate': (0.4, 0.0),
  'warmup': '5000 steps',
  'decay': 1e-5,
  'dropout': None,
  'depth': 0.1,
  'ema': 0.0,
}


class TestRecipes:
  """Against section 6.2 and appendix A.5 of arXiv 2102.06171."""

  @pytest.mark.parametrize(
    ('module', 'arguments', 'changes'),
    [
      (finetune, [], {}),
      (finetune, ['plain'], {}),
      (finetune, ['sam'], SAM),
      (finetune, ['scaling'], FINETUNE_SCALING),
      (pretrain, [], PRETRAIN),
      (pretrain, ['nfnet'], PRETRAIN),
      (pretrain, ['resnet'], RESNET),
      (pretrain, ['scaling'], SCALING),
    ],
  )
  def test_numbers(self, module, arguments, changes):
    config = module.get_config(*arguments)
    assert config.dataset is None
    config.dataset = 'any'
    if module is finetune:
      assert config.model.name is None
      config.model.name = 'nfnet_f4'
    resolved = steps.prepare_config(config)
    assert published(resolved) == {**FINETUNE, **changes}
    clipping = 0.0 if arguments == ['resnet'] else 0.01
    assert resolved.optimizer.clipping == clipping

  @pytest.mark.parametrize(
    ('arguments', 'model'), [([], 'nfnet_f4'), (['resnet'], 'nf_resnet50')]
  )
  def test_pretraining_is_at_224_pixels(self, arguments, model):
    config = pretrain.get_config(*arguments)
    assert config.model.name == model
    config.dataset = 'any'
    for name in (model, 'nfnet_f4_plus', 'bn_resnet50'):
      config.model.name = name
      data = steps.prepare_config(config).data
      assert (data.image_size, data.eval_size) == (224, 224)

  def test_sizes_at_scale(self):
    """Against arXiv 2310.16764."""
    for config, model, sizes in (
      (pretrain.get_config('scaling'), 'nfnet_f7_plus', (224, 256)),
      (finetune.get_config('scaling'), None, (384, 480)),
    ):
      assert config.model.name == model
      assert (config.data.image_size, config.data.eval_size) == sizes

  def test_learning_rate_does_not_scale_with_the_batch(self, data_dir):
    config = settings('none', data_dir)
    config.weights = None
    config.model.name = 'nfnet_pico'
    for batch in (16, 512):
      config.batch_size = batch
      rate = steps.prepare_config(config).optimizer.learning_rate
      assert rate == 0.1

  @pytest.mark.parametrize('name', ['finetune:lora', 'pretrain:vit'])
  def test_unknown_argument(self, run_command, tmp_path, name):
    flags = f'--config={name}', f'--workdir={tmp_path}/run'
    code, out, err = run_command(train.main, *flags, '--config.dataset=digits')
    assert (code, out) == (2, '')
    assert len(err.splitlines()) == 1
    assert f"'{name.split(':')[1]}' is no" in err
    assert 'plain, sam' in err or 'nfnet, resnet' in err


@pytest.fixture
def tune(folder, data_dir):
  """Flags of a short fine-tuning, of all but weights and workdir."""
  return [
    '--config=finetune',
    '--config.dataset=digits',
    f'--config.run.data_dir={data_dir}',
    '--config.data.eval_split=test',
    '--config.run.fast_paths=fused_blocks',  # Compiles sooner.
    '--config.batch_size=16',
    '--config.data.shards=8',
    '--config.train_for=6 steps',
    '--config.optimizer.warmup=2 steps',
    '--config.run.eval_batch_size=64',
    '--config.run.eval_every=6 steps',
    '--config.run.checkpoint_every=3 steps',
  ]


@pytest.fixture
def run(run_command, folder, tune):
  """The folder of a finished run, made once."""
  workdir = folder / 'run'
  if not workdir.exists():
    flags = [*tune, f'--config.weights={folder}/seven.npz']
    code, _, err = run_command(train.main, *flags, f'--workdir={workdir}')
    assert code == 0, err
    assert 'seven.npz, classifier new (7 classes there)' in err
  return workdir


def state_of(workdir, step):
  with checkpoint.Checkpoints(
    workdir / 'checkpoints', read_only=True
  ) as checkpoints:
    fields = ('params', 'ema_params', 'opt_state')
    return checkpoints.restore_fields(fields, step)


@pytest.mark.slow
class TestRun:
  """Through the commands."""

  def test_files_of_the_run(self, run, folder):
    config = json.loads((run / 'config.json').read_text())
    assert config['weights'] == f'{folder}/seven.npz'
    assert config['model']['name'] == 'nfnet_pico'
    names = (run / 'classes.txt').read_text().splitlines()
    assert names == [str(digit) for digit in range(10)]
    weights = nfnet_jax.load_weights(run)
    assert weights.class_names == tuple(names)

  def test_ema_weights_are_what_evaluate_reports(
    self, run_command, run, data_dir
  ):
    code, out, err = run_command(
      evaluate.main, f'--workdir={run}', '--json', on_a_run=True
    )
    assert code == 0, err
    of_run = json.loads(out)
    flags = [
      f'--weights={run}',
      '--config=finetune',
      '--config.dataset=digits',
      f'--config.run.data_dir={data_dir}',
      '--config.data.eval_split=test',
      '--config.run.eval_batch_size=50',
    ]
    code, out, err = run_command(evaluate.main, *flags, '--json', on_a_run=True)
    assert code == 0, err
    of_weights = json.loads(out)
    assert set(of_weights) == {'examples', 'loss', 'top1', 'top5'}
    assert of_weights['examples'] == of_run['examples'] == 355
    for name in ('loss', 'top1', 'top5'):
      expected = pytest.approx(of_run[f'ema_{name}'], rel=1e-5)
      assert of_weights[name] == expected
    assert of_run['loss'] != pytest.approx(of_run['ema_loss'], rel=1e-5)
    code, out, _ = run_command(evaluate.main, *flags, on_a_run=True)
    assert (code, len(out.splitlines())) == (0, 1)
    assert out.startswith('weights: top-1 ')
    assert out.endswith(' on 355 images\n')

  def test_a_begun_run_does_not_need_its_first_weights(
    self, run_command, run, folder, tune
  ):
    (folder / 'seven.npz').rename(folder / 'away.npz')
    resolve.read_weights.cache_clear()
    resume = [*tune, f'--config.weights={folder}/seven.npz']
    try:
      evaluated = run_command(evaluate.main, f'--workdir={run}', on_a_run=True)
      resumed = run_command(train.main, *resume, f'--workdir={run}')
      fresh = run_command(train.main, *resume, f'--workdir={folder}/fresh')
    finally:
      (folder / 'away.npz').rename(folder / 'seven.npz')
    assert evaluated[0] == 0, evaluated[2]
    assert resumed[0] == 0, resumed[2]
    assert 'Resuming after step 6.' in resumed[2]
    assert fresh[0] == 2
    assert 'seven.npz' in fresh[2]

  def test_other_commands_take_it(self, run_command, run, tmp_path, data_dir):
    photos = trained_weights.write_photos(tmp_path / 'photos', 2)
    flags = f'--weights={run}', str(photos[0]), '--json'
    code, out, _ = run_command(predict.main, *flags, takes='IMAGE...')
    assert code == 0
    top = json.loads(out)['images'][0]['top5']
    assert {guess['name'] for guess in top} <= set('0123456789')
    flags = f'--weights={run}', str(photos[0]), f'--to={tmp_path}/f.npz'
    assert run_command(features.main, *flags, takes='[IMAGE...]')[0] == 0

  def test_an_interrupted_run_resumes(
    self, run_command, run, folder, tune, tmp_path, monkeypatch
  ):
    stream = experiment_lib.Experiment.train_batches

    def failing(self, first_step, log_fn):
      for batch in stream(self, first_step, log_fn):
        if batch['step'] == 4:
          raise RuntimeError('power cut')
        yield batch

    flags = [*tune, f'--config.weights={folder}/seven.npz']
    flags += [f'--workdir={tmp_path}/parts']
    with monkeypatch.context() as patch:
      patch.setattr(experiment_lib.Experiment, 'train_batches', failing)
      with pytest.raises(RuntimeError, match='power cut'):
        run_command(train.main, *flags)
    with monkeypatch.context() as patch:
      patch.setattr(experiment_lib.Experiment, 'create_state', None)
      code, _, err = run_command(train.main, *flags)
    assert code == 0, err
    assert 'Resuming after step ' in err
    ours, theirs = (state_of(w, 6) for w in (tmp_path / 'parts', run))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
      np.testing.assert_array_equal(a, b)

  def test_other_weights_are_another_experiment(
    self, run_command, run, folder, tune, monkeypatch
  ):
    monkeypatch.setattr(jax, 'pmap', None)
    flags = [*tune, f'--config.weights={folder}/ten.npz', f'--workdir={run}']
    code, _, err = run_command(train.main, *flags)
    assert code == 2
    assert f'weights: {folder}/seven.npz there, {folder}/ten.npz here' in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (
      ['--config.weights={tmp}/ten.npz', '--config.model.name=nfnet_f0'],
      "The weights are of 'nfnet_pico', not of 'nfnet_f0'. Use "
      '--config.model.name=nfnet_pico.',
    ),
    (
      ['--config.weights={tmp}/none.npz'],
      "There are no weights '{tmp}/none.npz'.",
    ),
    (['--config.weights={tmp}'], 'the folder holds no run'),
    ([], 'Name a model: --config.model.name=NAME, or a trained one'),
    (
      ['--config.weights={tmp}/ten.npz', '--config.dataset=digitz'],
      "TFDS knows no dataset 'digitz'",
    ),
    (
      ['--config.weights={tmp}/ten.npz', '--config.data.eval_split=dev'],
      "has no split 'dev'",
    ),
  ],
)
def test_bad_input(
  run_command, folder, tune, tmp_path, monkeypatch, flags, message
):
  monkeypatch.setattr(jax, 'pmap', None)
  flags = [flag.format(tmp=folder) for flag in flags]
  code, out, err = run_command(
    train.main, *tune, *flags, f'--workdir={tmp_path}/run'
  )
  assert (code, out) == (2, '')
  assert len(err.splitlines()) == 1
  assert message.format(tmp=folder) in err
  assert not (tmp_path / 'run').exists()


def test_no_dataset(run_command, folder, tmp_path):
  weights = f'--config.weights={folder}/ten.npz'
  for flags in (['--config=finetune', weights], ['--config=pretrain']):
    code, _, err = run_command(train.main, *flags, f'--workdir={tmp_path}/run')
    assert code == 2
    (line,) = err.splitlines()
    assert 'Name a dataset: --config.dataset=NAME' in line


class TestEvaluateWeights:
  @pytest.mark.parametrize(
    ('flags', 'message'),
    [
      (
        ['--weights={tmp}/seven.npz', '--config.model.name=nfnet_pico'],
        "'{tmp}/seven.npz' has 7 classes, 'digits' has 10. Fine-tune",
      ),
      (
        ['--weights={tmp}/ten.npz'],
        "The weights are of 'nfnet_pico', not of 'nfnet_nano'. Use "
        '--config.model.name=nfnet_pico.',
      ),
      (['--weights={tmp}/none'], "There are no weights '{tmp}/none'"),
    ],
  )
  def test_refusals(
    self, run_command, folder, data_dir, monkeypatch, flags, message
  ):
    monkeypatch.setattr(jax, 'pmap', None)
    flags = [flag.format(tmp=folder) for flag in flags]
    data = f'--config.run.data_dir={data_dir}'
    code, out, err = run_command(
      evaluate.main, '--config=digits', data, *flags, on_a_run=True
    )
    assert (code, out) == (2, '')
    assert len(err.splitlines()) == 1
    assert message.format(tmp=folder) in err

  @pytest.mark.parametrize(
    ('flags', 'expected'),
    [
      ([], '48 px, squash crop, margin 4 px: of the weights'),
      pytest.param(
        ['--config.data.eval_size=32', '--config.data.eval_margin=0'],
        '32 px, squash crop, margin 0 px: overridden',
        marks=pytest.mark.slow,
      ),
    ],
  )
  def test_images_are_those_of_the_weights_unless_overridden(
    self, run_command, tmp_path, trained, data_dir, flags, expected
  ):
    size = dataclasses.replace(trained.preprocessing, size=48)
    weights = dataclasses.replace(trained, preprocessing=size)
    nfnet_jax.save_weights(tmp_path / 'w.npz', weights)
    code, _, err = run_command(
      evaluate.main,
      '--config=digits',
      '--config.model.name=nfnet_pico',
      f'--config.run.data_dir={data_dir}',
      '--config.data.eval_split=test[:8]',
      f'--weights={tmp_path}/w.npz',
      *flags,
      on_a_run=True,
    )
    assert code == 0, err
    assert expected in err

  def test_without_a_config(self, run_command, folder):
    flag = f'--weights={folder}/ten.npz'
    code, _, err = run_command(evaluate.main, flag, on_a_run=True)
    assert code == 2
    assert 'Give an experiment: --config=NAME' in err

  def test_a_given_setting_is_kept(self, folder, trained):
    config = digits_config.get_config()
    config.model.name = 'nfnet_pico'
    resolved = steps.prepare_config(
      resolve.set_model_from_weights(config, trained)
    )
    assert resolved.data.eval_margin == config.data.eval_margin
