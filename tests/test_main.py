import subprocess
import sys

import pytest

import nfnet_jax
from nfnet_jax import __main__ as main
from nfnet_jax.experiments import models


def test_commands_are_listed_with_a_line_each(capsys):
  main.main(['nfnet'])
  lines = capsys.readouterr().out.splitlines()
  assert '  models              ' + models.__doc__.splitlines()[0] in lines
  names = [line.split()[0] for line in lines if line.startswith('  ')]
  assert {'train', 'evaluate', 'predict', 'plan'} < set(names)


def test_version_is_printed(capsys):
  main.main(['nfnet', '--version'])
  assert capsys.readouterr().out == f'{nfnet_jax.__version__}\n'


def test_unknown_command_suggests_one(capsys):
  with pytest.raises(SystemExit) as stop:
    main.main(['nfnet', 'trian', '--config=digits'])
  assert stop.value.code == 2
  assert capsys.readouterr().err == (
    "nfnet_jax: There is no command 'trian'. Did you mean 'train'? nfnet "
    '--help lists them.\n'
  )


@pytest.mark.parametrize(
  ('arguments', 'code', 'output'),
  [
    (['models', '-h'], 0, models.__doc__.splitlines()[0]),
    (['models', '--size=3'], 2, 'models takes no --size'),
    (['models', 'nfnet_pico'], 0, 'nfnet_pico    '),
  ],
)
def test_command_runs_with_its_flags(arguments, code, output):
  done = subprocess.run(
    [sys.executable, '-m', 'nfnet_jax', *arguments],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == code
  assert output in done.stdout + done.stderr


@pytest.mark.parametrize(
  'arguments',
  [
    ['-h'],
    ['train', '--list_configs'],
    pytest.param(['train', '--help'], marks=pytest.mark.slow),
  ],
)
def test_a_reader_that_ends_first_is_no_error(arguments):
  program = [sys.executable, '-m', 'nfnet_jax', *arguments]
  with subprocess.Popen(
    program, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.close()
    assert process.stderr.read() == b''
  assert process.returncode == 1
