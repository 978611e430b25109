"""SAM: the step against its definition, and what it must not change."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nfnet_jax
from nfnet_jax.distributed import preemption
from nfnet_jax.models import inputs
from nfnet_jax.training import data_parallel, nonfinite, sam, state, step
from tests.training import linear_runs, small_models

CLASSES, SIZE = small_models.CLASSES, linear_runs.SIZE
EACH = 10  # Examples per device.
# Share -> the chosen ones of ten examples, by hand.
CHOSEN = {0.04: [0], 0.2: [0, 5], 0.3: [0, 3, 6], 1.0: list(range(10))}
RATE, DECAY, SMOOTHING = 0.3, 0.2, 0.1
COMPILER_OPTIONS = {'xla_backend_optimization_level': 0}


def make_trainer(devices=1, **changes):
  """Return a trainer of a linear classifier by SGD with weight decay."""
  return step.Trainer(
    **{
      'model': small_models.linear(),
      'optimizer': optax.chain(
        optax.add_decayed_weights(DECAY), optax.sgd(RATE)
      ),
      'schedule': lambda _: RATE,
      'num_classes': CLASSES,
      'global_batch': EACH * devices,
      'label_smoothing': SMOOTHING,
      **changes,
    }
  )


def make_batch(devices=1, size=SIZE, classes=CLASSES):
  """Return examples with mixed labels, each of another colour."""
  rng = np.random.default_rng(5)
  n = EACH * devices
  share = rng.uniform(0, 1, (n, 1))
  noise = rng.uniform(0, 255, (n, size, size, 3))
  tint = rng.uniform(-900, 900, (n, 1, 1, 3))
  return {
    'image': (noise + tint).astype(np.float32),
    'label': rng.integers(0, classes, (n, 2)).astype(np.int32),
    'weight': np.concatenate([share, 1 - share], 1).astype(np.float32),
    'position': np.arange(n, dtype=np.int32),
    'step': np.int32(0),
  }


def make_state(trainer, size=SIZE):
  """Make a state without zeros, which would make gradients zero."""
  fresh = state.create_state(
    trainer.model, trainer.optimizer, seed=1, image_size=size
  )
  rng = np.random.default_rng(2)
  nudge = lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32)
  return jax.device_get(
    fresh._replace(params=jax.tree.map(nudge, fresh.params))
  )


def take_step(trainer, batch, devices=1, size=SIZE):
  parallel = data_parallel.DataParallel(jax.local_devices()[:devices])
  initial = parallel.replicate(make_state(trainer, size))
  placed = parallel.shard_batch(batch)
  compiled = (
    parallel.train_step(trainer)
    .lower(initial, placed)
    .compile(COMPILER_OPTIONS)
  )
  return jax.device_get(compiled(initial, placed))


def perturb(trainer, initial, batch):
  return jax.jit(trainer.perturb)(initial, batch)


def change(batch, chosen, name, value):
  """Overwrite examples of one device's batch."""
  changed = batch[name].copy()
  changed[chosen] = np.broadcast_to(value, changed.shape)[chosen]
  return {**batch, name: changed}


def assert_close(ours, theirs, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs
  )


def assert_same(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def distance(ours, theirs):
  return float(optax.tree.norm(optax.tree.sub(ours, theirs)))


class Reference:
  """The definition in NumPy, in float64, one device after the other."""

  def __init__(self, trainer, batch, devices):
    self.batch, self.devices, self.n = batch, devices, trainer.global_batch
    params = make_state(trainer).params['linear']
    self.w, self.b = (np.float64(params[name]) for name in ('w', 'b'))

  def examples(self, chosen):
    image = self.batch['image'][chosen].astype(np.float64).mean((1, 2))
    x = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    targets = np.full((len(chosen), CLASSES), SMOOTHING / CLASSES)
    for row, example in zip(targets, chosen):
      for label, weight in zip(
        self.batch['label'][example], self.batch['weight'][example]
      ):
        row[label] += (1 - SMOOTHING) * weight
    return x, targets

  def gradient(self, w, b, chosen):
    x, targets = self.examples(chosen)
    logits = x @ w + b
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    slope = (np.exp(log_p) - targets) / self.n
    return -(targets * log_p).sum() / self.n, x.T @ slope, slope.sum(0)

  def step(self, rho, in_part):
    """Return loss, gradient norm and parameters after the step."""
    loss, dw, db = 0.0, 0.0, 0.0
    for device in range(self.devices):
      first = EACH * device
      _, up_w, up_b = self.gradient(
        self.w, self.b, [first + i for i in in_part]
      )
      length = np.sqrt((up_w**2).sum() + (up_b**2).sum())
      descent = self.gradient(
        self.w + rho * up_w / length,
        self.b + rho * up_b / length,
        range(first, first + EACH),
      )
      loss, dw, db = loss + descent[0], dw + descent[1], db + descent[2]
    norm = np.sqrt((dw**2).sum() + (db**2).sum())
    w = self.w - RATE * (dw + DECAY * self.w)
    b = self.b - RATE * (db + DECAY * self.b)
    return loss, norm, {'linear': {'w': w, 'b': b}}


@pytest.mark.parametrize(
  ('devices', 'share'),
  [
    *((1, share) for share in CHOSEN),
    (8, 0.3),
    *(
      pytest.param(8, share, marks=pytest.mark.slow)
      for share in (0.04, 0.2, 1.0)
    ),
  ],
)
def test_step_is_the_definition(devices, share):
  trainer = make_trainer(devices, sam_rho=0.4, sam_share=share)
  batch = make_batch(devices)
  reference = Reference(trainer, batch, devices)
  loss, norm, params = reference.step(0.4, CHOSEN[share])
  final, metrics = take_step(trainer, batch, devices)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-4)
  assert metrics['applied'] == 1
  assert_close(final.params, params, rtol=1e-4, atol=1e-5)
  # Without SAM, or with other examples, the step differs.
  assert distance(reference.step(0.0, [0])[2], params) > 0.01
  others = [i + 1 for i in CHOSEN[share]] if share < 1 else [0]
  assert distance(reference.step(0.4, others)[2], params) > 0.01


def test_sub_batch_is_evenly_spaced():
  batch = {'label': np.arange(32), 'step': np.int32(3)}
  part = sam.sub_batch(batch, 0.2)
  assert part['label'].tolist() == [0, 5, 10, 16, 21, 26]
  assert part['step'] == 3
  for size in range(1, 40):
    for share in (0.01, 0.2, 0.5, 0.99, 1.0):
      chosen = sam.sub_batch({'label': np.arange(size)}, share)['label']
      assert len(chosen) == max(1, round(share * size))
      gaps = np.diff([*chosen, size])
      assert gaps.min() >= 1
      assert gaps.max() - gaps.min() <= 1


def test_only_the_sub_batch_perturbs_the_weights():
  trainer = make_trainer(sam_rho=0.4)
  initial, batch = make_state(trainer), make_batch()
  perturb_by = jax.jit(lambda batch: trainer.perturb(initial, batch))
  expected = perturb_by(batch)
  assert distance(expected, initial.params) == pytest.approx(0.4, rel=1e-4)
  others = [i for i in range(EACH) if i not in CHOSEN[0.2]]
  changes = {
    'label': (batch['label'] + 1) % CLASSES,
    'weight': 0.0,
    'image': np.nan,
  }
  for name, value in changes.items():
    assert_same(perturb_by(change(batch, others, name, value)), expected)
    for example in CHOSEN[0.2]:
      moved = perturb_by(change(batch, [example], name, value))
      assert not distance(moved, expected) < 1e-3


def test_without_rho_the_step_is_the_plain_one_bit_for_bit():
  batch, off = make_batch(8), make_trainer(8, sam_rho=0.0, sam_share=0.7)
  plain = take_step(make_trainer(8), batch, 8)
  assert_same(take_step(off, batch, 8), plain)
  # Nothing is computed for it.
  initial = make_state(off)
  assert off.perturb(initial, batch) is initial.params


def test_zero_gradient_perturbs_nothing():
  """Rows without weight, such as padding, have no gradient."""
  trainer = make_trainer(sam_rho=0.4)
  batch = change(make_batch(), CHOSEN[0.2], 'weight', 0)
  initial = make_state(trainer)
  assert_same(perturb(trainer, initial, batch), initial.params)
  final, metrics = take_step(trainer, batch)
  plain, plain_metrics = take_step(make_trainer(), batch)
  assert metrics['applied'] == 1
  assert_close(final.params, plain.params, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss'], plain_metrics['loss'], rtol=1e-6)


def test_tiny_gradients_are_normalised_as_well():
  grads = {'a': jnp.array([3e-15, 0.0]), 'b': jnp.array([[-4e-15]])}
  zeros = jax.tree.map(jnp.zeros_like, grads)
  expected = {'a': [0.03, 0.0], 'b': [[-0.04]]}
  moved = sam.ascend(zeros, grads, 0.05)
  np.testing.assert_allclose(moved['a'], expected['a'], rtol=1e-5)
  np.testing.assert_allclose(moved['b'], expected['b'], rtol=1e-5)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_nonfinite_gradient_stays_visible(bad):
  grads = {'a': jnp.array([1.0, bad])}
  moved = sam.ascend({'a': jnp.ones(2)}, grads, 0.05)
  assert not np.isfinite(moved['a'][1])


def test_bfloat16_computes_low_and_keeps_high():
  low = make_trainer(sam_rho=0.4, compute_dtype=jnp.dtype('bfloat16'))
  initial, batch = make_state(low), make_batch()
  perturbed = perturb(low, initial, batch)
  assert {p.dtype.name for p in jax.tree.leaves(perturbed)} == {'float32'}
  assert distance(perturbed, initial.params) == pytest.approx(0.4, rel=1e-5)
  high = make_trainer(sam_rho=0.4)
  error = distance(perturbed, perturb(high, initial, batch))
  assert 0 < error < 0.02 * 0.4
  final, metrics = take_step(low, batch)
  expected, expected_metrics = take_step(high, batch)
  assert metrics['applied'] == 1
  loss = expected_metrics['loss']
  np.testing.assert_allclose(metrics['loss'], loss, rtol=0.02)
  moved = distance(expected.params, initial.params)
  assert distance(final.params, expected.params) < 0.02 * moved


def test_running_statistics_are_those_of_the_descent():
  trainer = make_trainer(
    model=small_models.normalised(), sam_rho=0.4, sam_share=0.5
  )
  initial, batch = make_state(trainer), make_batch()
  final, _ = take_step(trainer, batch)
  x = np.mean(inputs.normalize_images(batch['image']), (1, 2))
  mean = lambda params, x: np.mean(
    x @ params['first']['w'] + params['first']['b'], axis=0
  )
  statistics = final.model_state['batch_norm/~/mean_ema']
  average, counter = np.squeeze(statistics['average']), statistics['counter']
  perturbed = perturb(trainer, initial, batch)
  np.testing.assert_allclose(average, mean(perturbed, x), rtol=1e-4, atol=1e-5)
  assert counter == 1
  # They are neither those of the first weights nor those of the sub-batch.
  assert distance(average, mean(initial.params, x)) > 0.01
  assert distance(average, mean(perturbed, x[::2])) > 0.01


@pytest.mark.parametrize(
  ('make_model', 'size'),
  [
    pytest.param(small_models.noisy, SIZE, id='noisy'),
    pytest.param(
      lambda: nfnet_jax.create(
        'nfnet_pico', CLASSES, stochdepth_rate=0.5, dropout_rate=0.5
      ),
      32,
      marks=pytest.mark.full,
      id='nfnet_pico',
    ),
  ],
)
def test_examples_draw_alike_in_both_passes(make_model, size):
  """The whole step with the paper's optimiser, against plain JAX."""
  model = make_model()
  trainer = make_trainer(
    model=model,
    optimizer=nfnet_jax.make_optimizer(RATE, weight_decay=DECAY),
    seed=7,
    sam_rho=0.2,
    sam_share=0.3,
  )
  batch = make_batch(size=size)
  # Positions as on the last of several devices.
  batch['position'] += 30
  initial = make_state(trainer, size)
  image = batch['image'] / 255 - np.float32([0.485, 0.456, 0.406])
  image /= np.float32([0.229, 0.224, 0.225])
  one_hot = np.eye(CLASSES)[batch['label']] * 0.9 + 0.1 / CLASSES
  target = (one_hot * batch['weight'][..., None]).sum(1)
  key = jax.random.fold_in(jax.random.key(7), 0)

  @jax.value_and_grad
  def gradient(params, chosen):
    position = batch['position'][chosen]
    logits, _ = model.apply(params, {}, key, image[chosen], True, position)
    losses = -jnp.sum(target[chosen] * jax.nn.log_softmax(logits), 1)
    return jnp.sum(losses) / EACH

  def reference(params):
    _, up = gradient(params, np.array(CHOSEN[0.3]))
    length = sum(jnp.sum(g**2) for g in jax.tree.leaves(up)) ** 0.5
    perturbed = jax.tree.map(lambda p, g: p + 0.2 * g / length, params, up)
    loss, down = gradient(perturbed, np.arange(EACH))
    return loss, trainer.optimizer.update(down, initial.opt_state, params)[0]

  compiled = jax.jit(reference).lower(initial.params).compile(COMPILER_OPTIONS)
  loss, updates = compiled(initial.params)
  final, metrics = take_step(trainer, batch, size=size)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-4)
  moved = optax.tree.sub(final.params, initial.params)
  assert distance(moved, updates) < 1e-3 * optax.tree.norm(updates)


def test_interrupted_run_resumes_bit_for_bit(tmp_path):
  def interrupted(first):
    for batch in linear_runs.train_batches(first):
      if batch['step'] == 7:
        os.kill(os.getpid(), signal.SIGTERM)
      yield batch

  trainer = linear_runs.make_trainer()
  trainer = dataclasses.replace(trainer, sam_rho=0.05)
  whole = linear_runs.Run(tmp_path / 'whole', trainer=trainer)
  whole.go()
  again = {'workdir': tmp_path / 'again', 'trainer': trainer}
  with pytest.raises(preemption.Interrupted):
    linear_runs.Run(**again, train_batches=interrupted).go()
  resumed = linear_runs.Run(**again)
  resumed.go()
  linear_runs.assert_same_run(resumed, whole)
  assert [row['step'] for row in whole.rows() if 'loss' in row][-1] == 12


def diagnose(trainer, batch):
  """Take a step that is not applied; return the tensors that are not finite."""
  return find_cause(trainer, batch).tensors


def find_cause(trainer, batch):
  final, metrics = take_step(trainer, batch)
  assert metrics['applied'] == 0
  assert_same(final, make_state(trainer))
  parallel = data_parallel.DataParallel(jax.local_devices()[:1])
  initial = parallel.replicate(make_state(trainer))
  return nonfinite.diagnose(trainer, parallel, initial, batch)


def test_diagnosis_separates_ascent_and_descent():
  trainer = make_trainer(sam_rho=0.4)
  others = [i for i in range(EACH) if i not in CHOSEN[0.2]]
  in_part = diagnose(trainer, change(make_batch(), [5], 'image', 1e30))
  assert in_part[0] == 'gradient norm (SAM ascent)'
  in_others = diagnose(trainer, change(make_batch(), others, 'image', 1e30))
  assert in_others == ['gradient norm (SAM descent)']


def test_advice_names_the_perturbation_only_with_sam():
  batch = change(make_batch(), [5], 'image', 1e30)
  assert 'optimizer.sam_rho' not in str(find_cause(make_trainer(), batch))
  advice = str(find_cause(make_trainer(sam_rho=0.4), batch))
  assert advice.endswith('a longer warm-up or a smaller optimizer.sam_rho.')


def test_diagnosis_uses_the_perturbed_weights():
  """The perturbation is so large that sums overflow; the weights are finite."""
  batch = make_batch()
  batch['image'] *= 1e3
  tensors = diagnose(make_trainer(sam_rho=1e37), batch)
  assert tensors[:2] == ['logits (SAM descent)', 'loss (SAM descent)']


def test_diagnosis_without_sam_names_no_pass():
  batch = change(make_batch(), [5], 'image', 1e30)
  assert diagnose(make_trainer(), batch) == ['gradient norm']
