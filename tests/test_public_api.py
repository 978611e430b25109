"""The names that `import nfnet_jax` offers, and their documentation."""

import inspect
import pathlib
import pydoc

import pytest

import nfnet_jax

NAMES = nfnet_jax.__all__
FUNCTIONS = [n for n in NAMES if inspect.isfunction(getattr(nfnet_jax, n))]


def test_names_are_there_and_sorted():
  assert len(set(NAMES)) == len(NAMES)
  assert all(hasattr(nfnet_jax, name) for name in NAMES)
  # In ruff's order: constants, classes, functions.
  kind = lambda name: (not name.isupper(), name[0].islower(), name)
  assert sorted(NAMES, key=kind) == NAMES


@pytest.mark.parametrize('name', [n for n in NAMES if not n.isupper()])
def test_name_has_a_docstring(name):
  first = inspect.getdoc(getattr(nfnet_jax, name)).splitlines()[0]
  assert first.endswith('.')
  # A method of a NamedTuple or dataclass that was never documented.
  assert not first.startswith(f'{name}(')


@pytest.mark.parametrize('name', FUNCTIONS)
def test_docstrings_of_functions_are_imperative(name):
  verb = inspect.getdoc(getattr(nfnet_jax, name)).split()[0]
  assert verb[0].isupper()
  assert not verb.endswith('s'), f"'{verb}' is not imperative"


@pytest.mark.parametrize('name', NAMES)
def test_help_works(name):
  text = pydoc.render_doc(getattr(nfnet_jax, name), renderer=pydoc.plaintext)
  assert text.startswith('Python Library Documentation')


def test_signature_of_agc_is_short():
  text = pydoc.render_doc(nfnet_jax.agc, renderer=pydoc.plaintext)
  signature = text.splitlines()[2]
  assert 'Union' not in signature
  assert 'typing.' not in signature
  assert len(signature) < 300


def test_types_are_marked_for_type_checkers():
  assert (pathlib.Path(nfnet_jax.__file__).parent / 'py.typed').is_file()


def test_aliases():
  assert nfnet_jax.create is nfnet_jax.create_model
  assert nfnet_jax.nfnet_sgd is nfnet_jax.make_optimizer
