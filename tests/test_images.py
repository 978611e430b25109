"""Images in files of any format are found and preprocessed."""

import os
import struct
import zlib

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from nfnet_jax import images, preprocessing
from nfnet_jax.data import pipeline, preprocess, sources


def smooth(height=40, width=60):
  """A picture that lossy formats change little."""
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / 9 + k) + np.cos(y / (7 + k)) for k in range(3)]
  return np.uint8(127.5 + 55 * np.stack(waves, -1))


PICTURE = smooth()
NOISE = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)


def save(path, pixels=PICTURE, mode='RGB', **options):
  Image.fromarray(pixels).convert(mode).save(path, **options)
  return path


def grey(pixels):
  return np.asarray(Image.fromarray(pixels).convert('L'))


def in_three(channel):
  return np.repeat(channel[..., None], 3, -1)


def big_endian_tiff(pixels):
  """A file that Pillow cannot write: grey, 16 bits, one strip."""
  height, width = pixels.shape
  data = pixels.astype('>u2').tobytes()
  short = lambda value: value << 16
  entries = [
    (256, 4, 1, width),
    (257, 4, 1, height),
    (258, 3, 1, short(16)),
    (259, 3, 1, short(1)),
    (262, 3, 1, short(1)),
    (273, 4, 1, 8),
    (277, 3, 1, short(1)),
    (278, 4, 1, height),
    (279, 4, 1, len(data)),
  ]
  fields = b''.join(struct.pack('>HHII', *entry) for entry in entries)
  start = b'MM\0*' + struct.pack('>I', 8 + len(data))
  return start + data + struct.pack('>H', len(entries)) + fields + bytes(4)


def prepared(path, size=24, crop='squash', margin=8):
  (result,) = images.prepare(
    [os.fspath(path)], preprocessing.EvalPreprocessing(size, crop, margin)
  )
  return result


class TestFormats:
  """Any format is read as RGB."""

  @pytest.mark.parametrize('name', ['a.png', 'a.bmp', 'a.tiff', 'a.ppm'])
  def test_lossless(self, tmp_path, name):
    pixels = images.read_image(save(tmp_path / name))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, PICTURE)

  @pytest.mark.parametrize('compression', ['tiff_lzw', 'tiff_deflate'])
  def test_compressed_tiff(self, tmp_path, compression):
    path = save(tmp_path / 'a.tif', compression=compression)
    np.testing.assert_array_equal(images.read_image(path), PICTURE)

  def test_webp(self, tmp_path):
    path = save(tmp_path / 'a.webp', lossless=True)
    np.testing.assert_array_equal(images.read_image(path), PICTURE)
    lossy = images.read_image(save(tmp_path / 'b.webp', quality=95)).astype(int)
    assert np.abs(lossy - PICTURE).mean() < 3

  def test_palette(self, tmp_path):
    path = tmp_path / 'a.png'
    image = Image.fromarray(NOISE).quantize(16)
    image.save(path)
    assert Image.open(path).mode == 'P'
    expected = np.asarray(image.convert('RGB'))
    np.testing.assert_array_equal(images.read_image(path), expected)
    image.save(tmp_path / 'b.png', transparency=3)
    np.testing.assert_array_equal(
      images.read_image(tmp_path / 'b.png'), expected
    )

  def test_transparency_is_dropped(self, tmp_path):
    alpha = np.random.default_rng(1).integers(0, 256, (*NOISE.shape[:2], 1))
    pixels = np.concatenate([NOISE, alpha], -1).astype(np.uint8)
    Image.fromarray(pixels, 'RGBA').save(tmp_path / 'a.png')
    np.testing.assert_array_equal(images.read_image(tmp_path / 'a.png'), NOISE)
    Image.fromarray(pixels[..., 2:], 'LA').save(tmp_path / 'b.png')
    np.testing.assert_array_equal(
      images.read_image(tmp_path / 'b.png'), in_three(NOISE[..., 2])
    )

  def test_jpegs(self, tmp_path):
    for mode, expected, limit in (
      ('RGB', PICTURE, 2),
      ('L', in_three(grey(PICTURE)), 2),
      ('CMYK', PICTURE, 3),
    ):
      path = save(tmp_path / f'{mode}.jpg', mode=mode, quality=98)
      assert Image.open(path).mode == mode
      pixels = images.read_image(path).astype(int)
      assert pixels.shape == expected.shape
      assert np.abs(pixels - expected).mean() < limit

  def test_grey_of_16_bits_keeps_its_high_byte(self, tmp_path):
    deep = np.random.default_rng(2).integers(0, 2**16, (9, 11), np.uint16)
    for name in ('a.png', 'a.tif'):
      Image.fromarray(deep).save(tmp_path / name)
      np.testing.assert_array_equal(
        images.read_image(tmp_path / name), in_three((deep >> 8).astype('u1'))
      )

  def test_big_endian_tiff_of_16_bits(self, tmp_path):
    deep = np.arange(99, dtype='>u2').reshape(9, 11) * 600
    (tmp_path / 'a.tif').write_bytes(big_endian_tiff(deep))
    assert Image.open(tmp_path / 'a.tif').mode == 'I;16B'
    np.testing.assert_array_equal(
      images.read_image(tmp_path / 'a.tif'), in_three((deep >> 8).astype('u1'))
    )

  def test_black_and_white(self, tmp_path):
    path = save(tmp_path / 'a.png', mode='1')
    assert Image.open(path).mode == '1'
    assert set(np.unique(images.read_image(path))) == {0, 255}

  @pytest.mark.parametrize('name', ['a.gif', 'a.webp', 'a.png', 'a.tiff'])
  def test_first_frame_of_several(self, tmp_path, name):
    frames = [
      Image.new('RGB', (20, 10), colour) for colour in ('red', 'blue', 'lime')
    ]
    options = {'lossless': True} if name == 'a.webp' else {}
    frames[0].save(
      tmp_path / name, save_all=True, append_images=frames[1:], **options
    )
    assert Image.open(tmp_path / name).n_frames == 3
    expected = np.full((10, 20, 3), [255, 0, 0])
    np.testing.assert_array_equal(images.read_image(tmp_path / name), expected)

  @pytest.mark.parametrize('orientation', range(1, 9))
  def test_orientation_in_exif(self, tmp_path, orientation):
    # Rows and columns of the stored image, as the standard defines them.
    turn = {
      1: lambda a: a,
      2: np.fliplr,
      3: lambda a: np.rot90(a, 2),
      4: np.flipud,
      5: lambda a: a.swapaxes(0, 1),
      6: lambda a: np.rot90(a, -1),
      7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
      8: np.rot90,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(NOISE).save(tmp_path / 'a.png', exif=exif)
    np.testing.assert_array_equal(
      images.read_image(tmp_path / 'a.png'), turn(NOISE)
    )

  def test_format_is_known_by_the_contents(self, tmp_path):
    path = save(tmp_path / 'a.jpg', format='PNG')
    np.testing.assert_array_equal(images.read_image(path), PICTURE)


class TestFaults:
  """Files that cannot be read have a reason of one line."""

  @pytest.mark.parametrize(
    ('content', 'fault'),
    [
      (b'', 'no format that Pillow knows'),
      (b'hello, world', 'no format that Pillow knows'),
      (b'\xff\xd8\xff\xe0', 'no format that Pillow knows'),
      (b'P6 0 0 255\n', ''),
      (b'P6 x y 255\n', ''),
      (b'BM' + bytes(52), ''),
    ],
  )
  def test_not_an_image(self, tmp_path, content, fault):
    (tmp_path / 'a.jpg').write_bytes(content)
    result = prepared(tmp_path / 'a.jpg')
    assert result.image is None
    assert result.path == str(tmp_path / 'a.jpg')
    assert result.fault == fault or (result.fault and not fault)
    assert '\n' not in result.fault

  @pytest.mark.parametrize('name', ['a.jpg', 'a.png', 'a.gif', 'a.tiff'])
  def test_truncated(self, tmp_path, name):
    whole = save(tmp_path / name, NOISE).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    result = prepared(tmp_path / name)
    assert result.image is None
    assert result.fault
    assert '\n' not in result.fault

  def test_decompression_bomb(self, tmp_path):
    # The header claims 60,000 pixels in height and width.
    data = bytearray(save(tmp_path / 'a.png').read_bytes())
    at = data.index(b'IHDR') + 4
    data[at : at + 8] = struct.pack('>II', 60_000, 60_000)
    crc = zlib.crc32(data[at - 4 : at + 13])
    data[at + 13 : at + 17] = struct.pack('>I', crc)
    (tmp_path / 'a.png').write_bytes(data)
    assert 'decompression bomb' in prepared(tmp_path / 'a.png').fault

  def test_deleted_after_it_was_found(self, tmp_path):
    assert 'No such file' in prepared(tmp_path / 'gone.png').fault

  def test_no_permission(self, tmp_path, monkeypatch):
    def fail(path):
      raise PermissionError(13, 'Permission\ndenied')

    monkeypatch.setattr(images, 'read_image', fail)
    assert prepared('a.png').fault == '[Errno 13] Permission denied'

  def test_an_error_without_a_message(self, monkeypatch):
    def fail(path):
      raise SyntaxError('')

    monkeypatch.setattr(images, 'read_image', fail)
    assert prepared('a.png').fault == 'SyntaxError'


class TestPreprocess:
  """Files, Pillow images and arrays become the same pixels."""

  PLAIN = preprocessing.EvalPreprocessing(24, 'squash', 8)

  def test_kinds_of_images(self, tmp_path):
    path = save(tmp_path / 'a.png')
    expected = prepared(path).image
    for image in (path, str(path), Image.open(path), PICTURE):
      pixels = images.preprocess(image, self.PLAIN)
      np.testing.assert_array_equal(pixels, expected)
    pixels = images.preprocess(jnp.float32(PICTURE), self.PLAIN)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-4)

  @pytest.mark.parametrize(
    ('image', 'message'),
    [
      ('gone.png', r"'gone\.png' cannot be read: .*No such file"),
      (PICTURE[..., 0], r'\[H, W, 3\], not \[40, 60\]'),
      (PICTURE[None], r'not \[1, 40, 60, 3\]'),
      (PICTURE[:0], r'not \[0, 60, 3\]'),
      (PICTURE / 255, '0 to 255, not 0 to 1'),
    ],
  )
  def test_what_cannot_be_used(self, image, message):
    with pytest.raises(images.ImageError, match=message):
      images.preprocess(image, self.PLAIN)

  def test_a_black_image_of_floats_can_be_used(self):
    assert not images.preprocess(0.0 * PICTURE, self.PLAIN).any()


class TestFind:
  """Files and folders are expanded to a list of files."""

  def names(self, folder, *arguments):
    found = images.find_images([f'{folder}/{name}' for name in arguments])
    assert all(isinstance(path, str) for path in found)
    return [os.path.relpath(path, folder) for path in found]

  @pytest.fixture
  def folder(self, tmp_path):
    for name in ('b.png', 'a.JPG', 'sub/z.png', 'sub/deep/c.webp', 'other.gif'):
      path = tmp_path / 'photos' / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(b'')
    for name in ('notes.txt', 'report.pdf', 'film.mpg', 'none', '.jpg'):
      (tmp_path / 'photos' / name).write_bytes(b'')
    return tmp_path

  def test_a_folder_is_sorted_by_name(self, folder):
    assert self.names(folder, 'photos') == [
      'photos/a.JPG',
      'photos/b.png',
      'photos/other.gif',
      'photos/sub/deep/c.webp',
      'photos/sub/z.png',
    ]

  def test_arguments_keep_their_order(self, folder):
    assert self.names(
      folder, 'photos/sub', 'photos/b.png', 'photos/a.JPG', 'photos/sub/'
    ) == [
      'photos/sub/deep/c.webp',
      'photos/sub/z.png',
      'photos/b.png',
      'photos/a.JPG',
      'photos/sub/deep/c.webp',
      'photos/sub/z.png',
    ]

  def test_a_file_may_have_any_ending(self, folder):
    named = ['photos/notes.txt', 'photos/none', 'photos/report.pdf']
    assert self.names(folder, *named) == named

  def test_a_folder_named_like_an_image(self, folder):
    inner = folder / 'photos' / 'album.jpg'
    inner.mkdir()
    (inner / 'x.png').write_bytes(b'')
    assert self.names(folder, 'photos/album.jpg') == ['photos/album.jpg/x.png']
    found = self.names(folder, 'photos')
    assert 'photos/album.jpg/x.png' in found
    assert 'photos/album.jpg' not in found

  def test_links(self, folder):
    photos = folder / 'photos'
    (photos / 'link.png').symlink_to(photos / 'b.png')
    (photos / 'dangling.png').symlink_to(photos / 'gone.png')
    found = self.names(folder, 'photos')
    assert 'photos/link.png' in found
    assert 'photos/dangling.png' in found  # Its fault says so below.
    assert 'No such file' in prepared(photos / 'dangling.png').fault
    with pytest.raises(images.MissingError, match='dangling'):
      self.names(folder, 'photos/dangling.png')

  def test_a_cycle_of_links(self, folder):
    (folder / 'photos' / 'sub' / 'up').symlink_to(folder / 'photos')
    found = self.names(folder, 'photos')
    assert found.count('photos/b.png') == 1
    assert len(found) == 5

  def test_a_folder_that_cannot_be_read(self, folder, monkeypatch):
    real = os.scandir

    def fail(path):
      if str(path).endswith('deep'):
        raise PermissionError(13, 'Permission denied', str(path))
      return real(path)

    monkeypatch.setattr(os, 'scandir', fail)
    with pytest.raises(images.MissingError, match=r'denied.*photos/sub/deep'):
      self.names(folder, 'photos')

  @pytest.mark.parametrize(
    ('argument', 'message'),
    [
      ('gone.jpg', 'no image or folder'),
      ('gone', 'no image or folder'),
      ('empty', 'no images in'),
      ('texts', 'no images in'),
    ],
  )
  def test_missing_arguments_are_named(self, folder, argument, message):
    (folder / 'empty' / 'below').mkdir(parents=True)
    (folder / 'texts').mkdir()
    (folder / 'texts' / 'a.txt').write_text('')
    arguments = [f'{folder}/photos', f'{folder}/{argument}']
    with pytest.raises(
      images.MissingError, match=f"{message} '{arguments[1]}'"
    ):
      images.find_images(arguments)

  def test_no_arguments(self):
    assert images.find_images([]) == []


def test_a_bucket(buckets, tmp_path):
  data = save(tmp_path / 'a.png').read_bytes()
  buckets.objects['ours'] = {'photos/a.png': data}
  url = 'gs://ours/photos/a.png'
  assert images.find_images([url]) == [url]
  result = prepared(url)
  with pytest.raises(images.MissingError, match=r'//ours/photos/b\.png'):
    images.find_images(['gs://ours/photos/b.png'])
  assert (result.path, result.fault) == (url, '')
  expected = prepared(tmp_path / 'a.png').image
  np.testing.assert_array_equal(result.image, expected)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'P', 'RGBA', 'LA', 'I;16'])
@pytest.mark.parametrize('crop', ['squash', 'centre'])
def test_pixels_are_those_of_evaluation(tmp_path, crop, mode):
  (tmp_path / 'root' / 'train' / 'class').mkdir(parents=True)
  path = tmp_path / 'root' / 'train' / 'class' / 'a.png'
  if mode == 'I;16':
    Image.fromarray(grey(NOISE).astype(np.uint16) * 257 - 9).save(path)
  else:
    save(path, NOISE, mode)
  assert Image.open(path).mode == mode
  for size, margin in ((24, 8), (64, 0), (33, 32)):
    batches = pipeline.eval_batches(
      sources.load(str(tmp_path / 'root')),
      'train',
      batch_size=1,
      preprocessing=preprocessing.EvalPreprocessing(size, crop, margin=margin),
    )
    ours = prepared(path, size, crop, margin)
    assert ours.fault == ''
    assert ours.image.dtype == np.float32
    theirs = next(batches)['image'][0]
    np.testing.assert_allclose(ours.image, theirs, rtol=0, atol=1e-3)


def test_the_two_crops_differ(tmp_path):
  path = save(tmp_path / 'a.png', NOISE)
  squashed, cut = (
    prepared(path, crop=crop).image for crop in preprocessing.CROPS
  )
  assert np.abs(squashed - cut).max() > 10


@pytest.mark.parametrize('subsampling', [0, 2])
def test_a_jpeg_is_close_to_what_evaluation_decodes(tmp_path, subsampling):
  """Pixels equal those of TensorFlow's exact transform."""
  path = save(tmp_path / 'a.jpg', quality=95, subsampling=subsampling)
  exact = tf.io.decode_jpeg(path.read_bytes(), dct_method='INTEGER_ACCURATE')
  np.testing.assert_array_equal(images.read_image(path), exact)
  for crop in preprocessing.CROPS:
    theirs = preprocess.decode_and_crop(
      path.read_bytes(), preprocessing.EvalPreprocessing(24, crop, 8)
    )
    ours = prepared(path, crop=crop).image
    assert np.abs(ours - theirs.numpy()).mean() < 2


@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize('crop', ['squash', 'centre'])
def test_extreme_shapes(tmp_path, crop, size):
  Image.new('RGB', size, (10, 20, 30)).save(tmp_path / 'a.png')
  image = prepared(tmp_path / 'a.png', crop=crop).image
  np.testing.assert_allclose(
    image, np.full((24, 24, 3), [10, 20, 30]), rtol=1e-5
  )


def test_many_files_keep_their_order(tmp_path):
  paths = []
  for index in range(images._AHEAD + 20):
    path = tmp_path / f'{index}.png'
    if index % 7 == 3:
      path.write_bytes(b'no')
    else:
      Image.new('RGB', (4, 4), (index, 0, 0)).save(path)
    paths.append(str(path))
  results = list(
    images.prepare(paths, preprocessing.EvalPreprocessing(4, 'squash', 0))
  )
  assert [result.path for result in results] == paths
  for index, result in enumerate(results):
    assert bool(result.fault) == (index % 7 == 3)
    if not result.fault:
      np.testing.assert_array_equal(result.image[..., 0], index)


def test_number_of_files_read_ahead_is_limited(monkeypatch):
  opened = []

  def read(path):
    opened.append(path)
    return PICTURE

  monkeypatch.setattr(images, 'read_image', read)
  paths = [f'{index}.png' for index in range(4 * images._AHEAD)]
  stream = images.prepare(
    paths, preprocessing.EvalPreprocessing(8, 'squash', 0)
  )
  assert next(stream).path == '0.png'
  stream.close()
  assert len(opened) <= images._AHEAD + 1
