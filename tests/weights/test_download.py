"""Weights are fetched by name or address from a server on this machine."""

import hashlib
import http.server
import os
import pickle
import re
import subprocess
import sys
import threading

import pytest

import nfnet_jax
from nfnet_jax.config import resolve
from nfnet_jax.weights import download
from tests.weights import trees


class Server:
  """Serves one file at every address.

  Attributes:
    data: its bytes.
    breaks_after: bytes after which it closes the connection; None for never.
    waits_after: bytes after which it waits until it is stopped; None for never.
    status: status of its answers.
    headers: additional headers of its answers.
    ranges: first byte that each request asked for.
    paths: path of each request.
  """

  def __init__(self, data):
    self.data, self.status, self.headers = data, 206, {}
    self.ranges, self.paths = [], []
    self.breaks_after = self.waits_after = None
    self._stopped = threading.Event()
    server = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_HEAD(self):
        self.begin(server.data)

      def do_GET(self):
        range_ = re.search(r'\d+', self.headers['Range'] or '')
        start = int(range_[0]) if range_ else 0
        server.ranges.append(start)
        body = server.data[start:] if server.status == 206 else server.data
        self.begin(body)
        self.wfile.write(body[: server.breaks_after][: server.waits_after])
        if server.waits_after is not None:
          server._stopped.wait()

      def begin(self, body):
        server.paths.append(self.path)
        status = server.status if self.headers['Range'] else 200
        if server.status == 404:
          status = 404
        self.send_response(status if body else 416)
        self.send_header('Content-Length', str(len(body)))
        for name, value in server.headers.items():
          self.send_header(name, value)
        self.end_headers()

      def log_message(self, *args):
        pass

    self._http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self._http.server_port}'
    threading.Thread(target=self._http.serve_forever).start()

  def stop(self):
    self._stopped.set()
    self._http.shutdown()
    self._http.server_close()


@pytest.fixture
def server(monkeypatch, tmp_path):
  """Return a server of weights of `nfnet_pico`, published as those of F0."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)
  server = Server(pickle.dumps(trees.filled()[0], 4))
  md5 = hashlib.md5(server.data).hexdigest()
  monkeypatch.setitem(download.PUBLISHED_MD5, 'nfnet_f0', md5)
  address = server.url + '/{}_haiku.npz'
  monkeypatch.setattr(download, 'PUBLISHED_URL', address)
  yield server
  server.stop()


def refuse(name):
  with pytest.raises(ValueError) as error:
    nfnet_jax.load_weights(name)
  message = str(error.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize('name', ['nfnet_f0', 'F0', '{url}/F0_haiku.npz'])
def test_weights_are_fetched_once(server, name):
  name = name.format(url=server.url)
  assert nfnet_jax.load_weights(name).model == 'nfnet_pico'
  server.stop()
  assert nfnet_jax.load_weights(name).model == 'nfnet_pico'
  assert server.ranges == [0]


def test_file_of_the_same_name_comes_first(server, tmp_path):
  (tmp_path / 'F0').write_bytes(server.data)
  assert nfnet_jax.load_weights('F0').model == 'nfnet_pico'
  assert not server.ranges


def test_run_keeps_the_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert resolve.absolute('F0') == 'F0'
  assert resolve.absolute('file.npz') == str(tmp_path / 'file.npz')


def test_interrupted_download_continues(server):
  server.breaks_after = 100_000
  assert 'ended early' in refuse('F0')
  assert 'ended early' in refuse('F0')
  server.breaks_after = None
  assert nfnet_jax.load_weights('F0').model == 'nfnet_pico'
  assert server.ranges == [0, 1 << 16, 2 << 16]  # Whole chunks are kept.


@pytest.mark.parametrize('sent', [0, 100_000])
def test_server_that_does_not_answer(server, monkeypatch, sent):
  monkeypatch.setattr(download, '_SECONDS', 0.3)
  server.waits_after = sent
  assert 'no answer for 0.3 s. Try again' in refuse('F0')
  server.waits_after = None
  assert nfnet_jax.load_weights('F0').model == 'nfnet_pico'
  assert server.ranges == [0, sent // (1 << 16) * (1 << 16)]


def test_server_without_ranges_starts_over(server):
  server.breaks_after = 100_000
  refuse('F0')
  server.breaks_after, server.status = None, 200
  assert nfnet_jax.load_weights('F0').model == 'nfnet_pico'


def test_parts_without_a_checksum_are_not_joined(server):
  # A query may be longer than a file's name.
  url = f'{server.url}/mine.npz?signature={"a" * 300}'
  server.breaks_after = 100_000
  assert 'ended early' in refuse(url)
  server.breaks_after = None
  assert nfnet_jax.load_weights(url).model == 'nfnet_pico'
  assert server.ranges == [0, 0]


def test_wrong_checksum_is_refused_and_nothing_kept(server):
  right = server.data
  server.data = right[:-1] + b'?'
  assert 'does not match the known hash' in refuse('F0')
  server.data = right
  assert nfnet_jax.load_weights('F0').model == 'nfnet_pico'
  assert server.ranges == [0, 0]


def load_from_hub(server, name):
  """Load weights in a process whose Hugging Face hub is a server."""
  program = f'import nfnet_jax; print(nfnet_jax.load_weights({name!r}).model)'
  return subprocess.run(
    [sys.executable, '-c', program],
    env=os.environ | {'HF_ENDPOINT': server.url, 'HF_HOME': 'hub'},
    capture_output=True,
    text=True,
  )


@pytest.mark.slow  # Starts processes.
def test_weights_of_the_hub_are_fetched_once(server):
  server.headers = {'X-Repo-Commit': 40 * 'a', 'ETag': '"1"'}
  name = 'hf:timm/a_network/weights.pkl@v1'
  assert load_from_hub(server, name).stdout == 'nfnet_pico\n'
  assert '/timm/a_network/resolve/v1/weights.pkl' in server.paths
  server.stop()
  assert load_from_hub(server, name).stdout == 'nfnet_pico\n'


@pytest.mark.slow  # Starts processes.
def test_a_file_that_the_hub_does_not_have(server):
  server.status = 404
  error = load_from_hub(server, 'hf:timm/a_network').stderr.splitlines()[-1]
  assert "'hf:timm/a_network' could not be downloaded: " in error
  assert '/timm/a_network/resolve/main/model.safetensors' in server.paths


def test_failures_are_one_line(server, monkeypatch):
  server.status = 404
  assert '404' in refuse(f'{server.url}/nothing.npz')
  server.stop()
  assert 'no connection. Try again' in refuse('F0')
  assert 'is not hf:OWNER/REPO' in refuse('hf:timm')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  assert "pip install '.[hub]'" in refuse('hf:timm/dm_nfnet_f0.dm_in1k')
