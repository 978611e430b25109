"""Compiling a step, and the cache of compiled programs."""

import contextlib
import types

import jax
import jax.numpy as jnp
import pytest

from nfnet_jax.planning import compilation, plan_errors


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  versions = {'jax': '1', 'jaxlib': '1', 'libtpu': '1'}
  monkeypatch.setattr(compilation, 'versions', lambda: versions)
  return tmp_path / 'nfnet_jax' / 'plans'


class Lowered:
  """Replaces a lowered step, and counts how often it is compiled."""

  def __init__(self, program='program', failure=''):
    self.program, self.failure = program, failure
    self.levels = []

  def as_text(self, debug_info):
    assert debug_info
    return self.program

  def compile(self):
    self.levels.append(jax.config.jax_optimization_level)
    if self.failure:
      raise jax.errors.JaxRuntimeError(self.failure)
    memory = types.SimpleNamespace(
      argument_size_in_bytes=100,
      output_size_in_bytes=90,
      alias_size_in_bytes=80,
      temp_size_in_bytes=50,
      generated_code_size_in_bytes=7,
    )
    return types.SimpleNamespace(
      memory_analysis=lambda: memory,
      cost_analysis=lambda: {'flops': 12.0},
      as_text=lambda: 'text',
    )


def test_a_program_is_compiled_once(cache):
  lowered = Lowered()
  first = compilation.compile_step(lowered, 'v3:2x2')
  again = compilation.compile_step(lowered, 'v3:2x2')
  assert len(lowered.levels) == 1
  assert (first.cached, again.cached) == (False, True)
  assert (again.text, again.flops, again.seconds) == (
    'text',
    12.0,
    first.seconds,
  )
  assert first.peak_bytes == again.peak_bytes == 100 + 90 - 80 + 50 + 7
  assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
  'change',
  [
    {'program': 'another'},
    {'pod': 'v3:4x4'},
    {'effort': 'quick'},
    {'libtpu': '2'},
    {'flags': '--xla_tpu_dot_dot_fusion=true'},
  ],
)
def test_each_input_is_part_of_the_cache_key(change, monkeypatch):
  compilation.compile_step(Lowered(), 'v3:2x2')
  if 'flags' in change:
    monkeypatch.setenv('LIBTPU_INIT_ARGS', change['flags'])
  if 'libtpu' in change:
    compilation.versions()['libtpu'] = change['libtpu']
  lowered = Lowered(change.get('program', 'program'))
  compilation.compile_step(
    lowered, change.get('pod', 'v3:2x2'), change.get('effort', 'full')
  )
  assert len(lowered.levels) == 1


def test_a_program_that_does_not_fit_is_cached_too():
  lowered = Lowered(failure='Used 20.00G of 15.50G hbm.')
  for _ in range(2):
    with pytest.raises(
      plan_errors.DoesNotFitError, match=r'4\.50 GiB too'
    ) as found:
      compilation.compile_step(lowered, 'v3:2x2')
    assert found.value.needed == 20 * 2**30
  assert len(lowered.levels) == 1


def test_other_failures_are_raised_and_not_cached(cache):
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
    compilation.compile_step(Lowered(failure='INTERNAL: no'), 'v3:2x2')
  assert not cache.exists()


@pytest.mark.parametrize('effort', ['full', 'quick'])
def test_effort_applies_only_while_compiling(effort):
  before = jax.config.jax_optimization_level
  lowered = Lowered()
  compilation.compile_step(lowered, 'v3:2x2', effort)
  assert lowered.levels == ['O1' if effort == 'quick' else before]
  assert jax.config.jax_optimization_level == before


def test_damaged_entries_are_compiled_again(cache):
  compilation.compile_step(Lowered(), 'v3:2x2')
  (path,) = cache.iterdir()
  whole = path.read_bytes()
  for damaged in (b'', b'nonsense', whole[:-9], whole[:20]):
    path.write_bytes(damaged)
    lowered = Lowered()
    assert compilation.compile_step(lowered, 'v3:2x2').text == 'text'
    assert len(lowered.levels) == 1


def test_an_unwritable_cache_folder_is_ignored(monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null')
  assert compilation.compile_step(Lowered(), 'v3:2x2').text == 'text'


def test_progress_is_shown_only_while_compiling():
  seen = []

  @contextlib.contextmanager
  def progress():
    seen.append('begin')
    yield
    seen.append('end')

  for _ in range(2):
    compilation.compile_step(Lowered(), 'v3:2x2', progress=progress)
  assert seen == ['begin', 'end']


def scoped(name):
  @jax.named_scope(name)
  def inner(x):
    return jnp.sin(x) * jnp.sum(x)

  return inner


def deeper(function, depth):
  if depth:
    return deeper(function, depth - 1)
  return jax.jit(lambda x: function(x) + 1).lower(jnp.ones(3))


def test_programs_differ_by_scopes_and_not_by_source_locations():
  def text(lowered):
    return compilation.replace_locations(lowered.as_text(debug_info=True))

  ours = text(deeper(scoped('agc'), 0))
  assert text(deeper(scoped('agc'), 3)) == ours
  assert text(deeper(scoped('ema'), 0)) != ours
  assert '/agc/sin' in ours
  assert '#loc' not in ours
  assert __file__ not in ours
