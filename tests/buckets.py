"""A fake Google Cloud Storage server on this machine, in memory.

It implements the requests of TensorFlow, TensorStore and google-cloud-storage.
TensorFlow knows only the real server's address, so for TensorFlow the fake is a
proxy to that address, with a self-signed certificate.
"""

import collections
from collections.abc import Callable
import contextlib
import datetime
import email
import http.server
import itertools
import json
import pathlib
import re
import ssl
import sys
import threading
import traceback
from urllib import parse

_HOSTS = 'www.googleapis.com', 'storage.googleapis.com'
_API = re.compile(
  r'/(?:(?P<upload>upload)/|download/)?storage/v1/b/(?P<bucket>[^/]+)'
  r'(?:/iam/testPermissions|/storageLayout'
  r'|/o(?:/(?P<name>[^/]+)(?P<rewrite>/rewriteTo/b/[^/]+/o/[^/]+)?)?)?'
)
_DOWNLOAD = re.compile(r'/(?P<bucket>[^/]+)/(?P<name>.+)')

# TensorFlow ends a rejected upload only after an idle timeout, and retries it.
# It reads these variables when it is imported.
SHORT_TIMEOUTS = {
  'GCS_REQUEST_IDLE_TIMEOUT_SECS': '1',
  'GCS_RETRY_CONFIG_INIT_DELAY_TIME_US': '1000',
  'GCS_RETRY_CONFIG_MAX_DELAY_TIME_US': '1000',
  'GCS_RETRY_CONFIG_MAX_RETRIES': '2',
}

# (method, object) -> the HTTP status to fail with, or None.
Fault = Callable[[str, str], int | None]


class Buckets(contextlib.AbstractContextManager):
  """A running server and its contents.

  Attributes:
    objects: bucket -> name -> contents; a bucket exists if it is a key.
    requests: (method, object) of all requests to objects, in order.
    fault: chooses which requests fail.
    withheld: names of the permissions that the caller lacks.
    environment: environment variables of processes that use this server.
  """

  def __init__(self, folder: pathlib.Path):
    self.objects: dict[str, dict[str, bytes]] = {}
    self.requests: list[tuple[str, str]] = []
    self.clear_faults()
    self.generations = collections.defaultdict(itertools.count(1).__next__)
    self.updated: dict[tuple[str, str], datetime.datetime] = {}
    self.uploads: dict[str, str] = {}
    self.lock = threading.RLock()
    certificate = folder / 'certificate.pem'
    key = folder / 'key.pem'
    _certify(certificate, key)
    self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self.tls.load_cert_chain(certificate, key)
    self._server = http.server.ThreadingHTTPServer(
      ('127.0.0.1', 0), type('Handler', (_Handler,), {'buckets': self})
    )
    self._server.daemon_threads = True
    self._server.handle_error = self._report_error
    address = f'http://127.0.0.1:{self._server.server_port}'
    self.environment = {
      'CLOUDSDK_CONFIG': str(folder),  # Without credentials.
      'CURL_CA_BUNDLE': str(certificate),
      'NO_GCE_CHECK': 'true',
      'STORAGE_EMULATOR_HOST': address,
      'TENSORSTORE_GCS_HTTP_URL': address,
      'https_proxy': address,
      'no_proxy': '127.0.0.1,localhost',
    }

  def __enter__(self) -> 'Buckets':
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *error) -> None:
    self._server.shutdown()
    self._server.server_close()

  def clear_faults(self) -> None:
    """End all faults."""
    self.fault: Fault = lambda method, name: None
    self.withheld: set[str] = set()

  def _report_error(self, request, address) -> None:
    if not isinstance(sys.exc_info()[1], OSError):  # The client disconnected.
      traceback.print_exc()

  def put(self, bucket: str, name: str, contents: bytes) -> None:
    """Store an object atomically, as the real server does."""
    with self.lock:
      self.objects[bucket][name] = contents
      self.generations.pop((bucket, name), None)
      self.updated[bucket, name] = datetime.datetime.now(datetime.UTC)

  def describe(self, bucket: str, name: str) -> dict[str, str]:
    """Return an object's metadata."""
    updated = self.updated.get((bucket, name))
    updated = updated or datetime.datetime.now(datetime.UTC)
    return {
      'kind': 'storage#object',
      'bucket': bucket,
      'name': name,
      'generation': str(self.generations[bucket, name]),
      'size': str(len(self.objects[bucket][name])),
      'updated': updated.strftime('%Y-%m-%dT%H:%M:%S.%fZ'),
    }

  def list(self, bucket: str, prefix: str, delimiter: str) -> dict[str, list]:
    """List objects under a prefix, and folders instead of deeper ones."""
    items, folders = [], {}
    for name in sorted(self.objects[bucket]):
      if not name.startswith(prefix):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
      else:
        items.append(self.describe(bucket, name))
    return {'items': items, 'prefixes': list(folders)}


class _Handler(http.server.BaseHTTPRequestHandler):
  buckets: Buckets
  protocol_version = 'HTTP/1.1'
  # Otherwise a small response in two packets is delayed.
  disable_nagle_algorithm = True
  wbufsize = -1

  def do_CONNECT(self):
    if self.path.partition(':')[0] not in _HOSTS:
      return self.send_error(403, f'Unknown host {self.path}')
    self.send_response(200)
    self.end_headers()
    self.wfile.flush()
    self.connection = self.buckets.tls.wrap_socket(
      self.connection, server_side=True
    )
    self.setup_streams()

  def setup_streams(self):
    self.request = self.connection
    self.rfile = self.connection.makefile('rb', self.rbufsize)
    self.wfile = self.connection.makefile('wb', self.wbufsize)
    self.close_connection = False

  def handle_method(self):
    body = self.read_body()
    url = parse.urlsplit(self.path)
    self.query = dict(parse.parse_qsl(url.query))
    self.permissions = parse.parse_qs(url.query).get('permissions', [])
    match = _API.fullmatch(url.path) or _DOWNLOAD.fullmatch(url.path)
    found = match.groupdict()
    self.bucket = parse.unquote(found['bucket'])
    name = found['name'] and parse.unquote(found['name'])
    self.name = name or self.query.get('name', '')
    with self.buckets.lock:
      self.buckets.requests.append((self.command, self.name))
      failure = self.buckets.fault(self.command, self.name)
      if failure or self.bucket not in self.buckets.objects:
        return self.answer(failure or 404)
      self.held = self.buckets.objects[self.bucket]
      if found.get('upload'):
        return self.upload(body)
      if found.get('rewrite'):
        return self.rewrite(found['rewrite'])
      if name:
        return self.serve_object(is_media='upload' not in found)
      return self.serve_bucket(url.path.rpartition('/')[2])

  def read_body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b''
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def handle_expect_100(self):
    super().handle_expect_100()
    self.wfile.flush()
    return True

  do_GET = do_POST = do_PUT = do_DELETE = handle_method  # noqa: N815

  def serve_bucket(self, what: str):
    if what == 'o':
      prefix = self.query.get('prefix', '')
      delimiter = self.query.get('delimiter', '')
      return self.answer(200, self.buckets.list(self.bucket, prefix, delimiter))
    if what == 'testPermissions':
      asked = set(self.permissions)
      granted = sorted(asked - self.buckets.withheld)
      return self.answer(200, {'permissions': granted})
    hierarchical = {'enabled': False}
    self.answer(
      200, {'name': self.bucket, 'hierarchicalNamespace': hierarchical}
    )

  def serve_object(self, is_media: bool):
    if self.name not in self.held:
      return self.answer(404)
    if self.command == 'DELETE':
      del self.held[self.name]
      return self.answer(204)
    if not is_media and self.query.get('alt') != 'media':
      return self.answer(200, self.buckets.describe(self.bucket, self.name))
    contents, status = self.held[self.name], 200
    asked = re.match(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
    headers = {}
    if asked:
      first, last = asked.groups()
      part = contents[int(first) : int(last) + 1 if last else None]
      if not part:
        return self.answer(416)
      end = int(first) + len(part) - 1
      headers['Content-Range'] = f'bytes {first}-{end}/{len(contents)}'
      contents, status = part, 206
    generation = self.buckets.generations[self.bucket, self.name]
    self.answer(
      status, contents, **headers, **{'x-goog-generation': generation}
    )

  def rewrite(self, target: str):
    *_, bucket, _, name = target.split('/')
    if self.name not in self.held:
      return self.answer(404)
    bucket, name = parse.unquote(bucket), parse.unquote(name)
    self.buckets.put(bucket, name, self.held[self.name])
    described = self.buckets.describe(bucket, name)
    self.answer(200, {'done': True, 'resource': described})

  def upload(self, body: bytes):
    kind = self.query['uploadType']
    if kind == 'resumable' and self.command == 'POST':
      session = f'{self.headers["Host"]}{self.path}&upload_id=1'
      scheme = 'https' if isinstance(self.connection, ssl.SSLSocket) else 'http'
      return self.answer(200, Location=f'{scheme}://{session}')
    if kind == 'multipart':
      header = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'
      message = email.message_from_bytes(header.encode() + body)
      metadata, content = message.get_payload()
      self.name = json.loads(metadata.get_payload())['name']
      body = content.get_payload(decode=True)
    expected = self.query.get('ifGenerationMatch')
    if expected is not None:
      key = self.bucket, self.name
      now = self.buckets.generations[key] if self.name in self.held else 0
      if int(expected) != now:
        return self.answer(412)
    self.buckets.put(self.bucket, self.name, body)
    self.answer(200, self.buckets.describe(self.bucket, self.name))

  def answer(self, status: int, content: bytes | dict = b'', **headers):
    if status >= 400:
      content = {'error': {'code': status, 'message': 'refused'}}
    if isinstance(content, dict):
      content = json.dumps(content).encode()
      headers['Content-Type'] = 'application/json'
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, str(value))
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    self.wfile.write(content)
    self.wfile.flush()

  def log_message(self, *arguments):
    pass


def _certify(certificate: pathlib.Path, key: pathlib.Path) -> None:
  """Write a self-signed certificate for Google's host names."""
  from cryptography import x509
  from cryptography.hazmat.primitives import hashes, serialization
  from cryptography.hazmat.primitives.asymmetric import ec

  private = ec.generate_private_key(ec.SECP256R1())
  name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, 'test')])
  now = datetime.datetime.now(datetime.UTC)
  names = [x509.DNSName(host) for host in _HOSTS]
  signed = (
    x509.CertificateBuilder(name, name, private.public_key())
    .serial_number(1)
    .not_valid_before(now - datetime.timedelta(days=1))
    .not_valid_after(now + datetime.timedelta(days=1))
    .add_extension(x509.SubjectAlternativeName(names), critical=False)
    .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    .sign(private, hashes.SHA256())
  )
  certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
  key.write_bytes(
    private.private_bytes(
      serialization.Encoding.PEM,
      serialization.PrivateFormat.PKCS8,
      serialization.NoEncryption(),
    )
  )
