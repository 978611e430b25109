"""Windows, partial decoding and resizing against NumPy and Pillow."""

import functools
import io

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from nfnet_jax import preprocessing
from nfnet_jax.data import preprocess


def photo(height, width):
  y, x = np.mgrid[:height, :width] / max(height, width)
  waves = [np.sin(5 * x + 3 * y + c) + np.cos(9 * y - 4 * x) for c in range(3)]
  grain = np.random.default_rng(0).normal(0, 6, (height, width, 3))
  image = np.stack(waves, axis=-1) * 60 + 128 + grain
  return np.clip(image, 0, 255).astype(np.uint8)


def noise(*shape, dtype=np.uint8):
  rng = np.random.default_rng(sum(shape))
  return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def encode(image, form, mode='RGB', **options):
  file = io.BytesIO()
  image = Image.fromarray(image)
  if mode == 'RGBA':
    image.putalpha(Image.fromarray(noise(image.height, image.width)))
  image.convert(mode).save(file, form, **options)
  return file.getvalue()


def without_adobe_marker(jpeg):
  begin = jpeg.index(b'\xff\xee')
  length = int.from_bytes(jpeg[begin + 2 : begin + 4], 'big')
  return jpeg[:begin] + jpeg[begin + 2 + length :]


jpeg = functools.partial(encode, form='JPEG', quality=90)
png = functools.partial(encode, form='PNG')

# Formats without chroma subsampling.
FORMATS = {
  'jpeg': functools.partial(jpeg, subsampling=0),
  'jpeg_progressive': functools.partial(jpeg, subsampling=0, progressive=True),
  'jpeg_grey': functools.partial(jpeg, mode='L'),
  'jpeg_cmyk': functools.partial(jpeg, mode='CMYK'),
  'jpeg_cmyk_plain': lambda image: without_adobe_marker(
    jpeg(image, mode='CMYK')
  ),
  'png': png,
  'png_grey': functools.partial(png, mode='L'),
  'png_rgba': functools.partial(png, mode='RGBA'),
  'png_palette': functools.partial(png, mode='P'),
  'png_16_bit': lambda image: tf.io.encode_png(
    noise(*image.shape, dtype=np.uint16)
  ).numpy(),
  'gif': functools.partial(encode, form='GIF'),
  'gif_animated': functools.partial(
    encode,
    form='GIF',
    save_all=True,
    append_images=[Image.fromarray(noise(9, 9, 3))],
  ),
  'bmp': functools.partial(encode, form='BMP'),
}
SUBSAMPLED = {
  'jpeg_422': functools.partial(jpeg, subsampling=1),
  'jpeg_420': functools.partial(jpeg, subsampling=2),
  'jpeg_420_progressive': functools.partial(
    jpeg, subsampling=2, progressive=True
  ),
}
ALL = {**FORMATS, **SUBSAMPLED}
WINDOWS = (
  *((0, 0, 61, 83), (0, 0, 1, 1), (60, 82, 1, 1), (3, 5, 40, 50)),
  *((16, 32, 16, 16), (17, 0, 44, 83), (0, 31, 61, 2), (59, 1, 2, 79)),
)


@functools.cache
def window_decoder():
  return tf.function(
    lambda encoded, window: preprocess.decode_window(encoded, lambda _: window),
    input_signature=[
      tf.TensorSpec([], tf.string),
      tf.TensorSpec([4], tf.int32),
    ],
  )


def compare_windows(encoded):
  """Yield windows as decoded, and as cut from the whole image."""
  whole = preprocess.decode(encoded).numpy()
  assert whole.shape == (61, 83, 3)
  for window in WINDOWS:
    y, x, height, width = window
    ours = window_decoder()(encoded, window).numpy()
    assert ours.shape == (height, width, 3)
    assert ours.dtype == np.uint8
    yield ours.astype(int), whole[y : y + height, x : x + width]


@pytest.mark.parametrize('name', FORMATS)
def test_window_equals_that_part_of_the_whole_image(name):
  for ours, expected in compare_windows(FORMATS[name](photo(61, 83))):
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize('name', SUBSAMPLED)
def test_subsampled_chroma_differs_only_in_the_outermost_columns(name):
  for ours, expected in compare_windows(SUBSAMPLED[name](photo(61, 83))):
    np.testing.assert_array_equal(ours[:, 1:-1], expected[:, 1:-1])
    np.testing.assert_allclose(ours, expected, atol=16)


# Pillow inverts all CMYK.
@pytest.mark.parametrize('name', sorted(ALL.keys() - {'jpeg_cmyk_plain'}))
def test_decode_equals_pillow(name):
  encoded = ALL[name](photo(61, 83))
  expected = np.asarray(Image.open(io.BytesIO(encoded)).convert('RGB'))
  ours = preprocess.decode(encoded)
  assert ours.dtype == tf.uint8
  atol = 3 if 'jpeg' in name else 0
  np.testing.assert_allclose(ours.numpy().astype(int), expected, atol=atol)


@pytest.mark.parametrize('name', ALL)
def test_one_pixel(name):
  encoded = ALL[name](photo(1, 1))
  pixel = preprocess.decode(encoded).numpy()
  assert pixel.shape == (1, 1, 3)
  choices = (
    lambda shape: preprocess.centre_window(shape, 32),
    lambda shape: preprocess.distorted_window(shape, 32, [0, 0]),
  )
  for choose in choices:
    ours = preprocess.decode_window(encoded, choose)
    np.testing.assert_array_equal(ours, pixel)
  for crop in preprocessing.CROPS:
    ours = preprocess.decode_and_crop(
      encoded, preprocessing.EvalPreprocessing(8, crop, 4)
    )
    np.testing.assert_allclose(ours, np.tile(pixel, (8, 8, 1)), atol=1e-3)


@pytest.mark.parametrize('name', ALL)
def test_window_is_chosen_by_height_and_width(name):
  seen = []
  encoded = ALL[name](photo(5, 9))
  whole = lambda shape: (seen.append(shape), tf.constant([0, 0, 1, 1]))[1]
  preprocess.decode_window(encoded, whole)
  assert [tuple(shape.numpy()[:2]) for shape in seen] == [(5, 9)]


@pytest.mark.parametrize('keep', [3, 200, 0.5, 0.98])
def test_corrupt_jpeg_raises(keep):
  encoded = jpeg(photo(64, 64))
  broken = encoded[: keep if keep > 1 else int(keep * len(encoded))]
  for crop in preprocessing.CROPS:
    with pytest.raises(tf.errors.InvalidArgumentError):
      preprocess.decode_and_crop(
        broken, preprocessing.EvalPreprocessing(32, crop, 0)
      )
  with pytest.raises(tf.errors.InvalidArgumentError):
    window_decoder()(broken, (0, 0, 64, 64))


def test_bytes_that_are_no_image_raise():
  for encoded in (b'', b'no image'):
    with pytest.raises(tf.errors.InvalidArgumentError):
      preprocess.decode(encoded)
    with pytest.raises(tf.errors.InvalidArgumentError):
      preprocess.decode_and_crop(
        encoded, preprocessing.EvalPreprocessing(8, 'centre', 0)
      )


@pytest.mark.parametrize(
  ('sides', 'reduce_to', 'reduction'),
  [
    ((200, 160), 81, 1),
    ((200, 160), 80, 2),
    ((200, 160), 41, 2),
    ((160, 200), 40, 4),
    ((200, 160), 20, 8),
    ((200, 160), 3, 8),
  ],
)
@pytest.mark.parametrize('name', ['jpeg', 'jpeg_420', 'jpeg_420_progressive'])
def test_jpeg_is_reduced_as_far_as_the_window_allows(
  name, sides, reduce_to, reduction
):
  encoded = ALL[name](photo(333, 401))
  window = tf.constant([101, 67, *sides])
  ours = preprocess.decode_window(encoded, lambda _: window, reduce_to)
  assert min(ours.shape[:2]) >= reduce_to
  height, width = (side // reduction for side in sides)
  assert ours.shape == (height, width, 3)
  whole = preprocess.decode(encoded).numpy().astype(float)
  y, x = 101 // reduction * reduction, 67 // reduction * reduction
  part = whole[y : y + height * reduction, x : x + width * reduction]
  blocks = part.reshape(height, reduction, width, reduction, 3).mean((1, 3))
  # Chroma of the outermost columns aside, the decoder averages blocks.
  inner = slice(2, -2)
  errors = np.abs(ours.numpy()[:, inner] - blocks[:, inner])
  assert errors.mean() < 1.5, errors.mean()
  mirrored = np.abs(ours.numpy()[::-1, inner] - blocks[:, inner])
  assert mirrored.mean() > 10


def test_other_formats_are_not_reduced():
  image = photo(64, 64)
  window = lambda _: tf.constant([0, 0, 64, 64])
  ours = preprocess.decode_window(png(image), window, 8)
  np.testing.assert_array_equal(ours, image)


@functools.cache
def window_sampler(size):
  @tf.function
  def windows(shape, seeds):
    window = lambda seed: preprocess.distorted_window(shape, size, seed)
    return tf.map_fn(window, seeds, fn_output_signature=tf.int32)

  return windows


def distorted(height, width, size=224, seeds=1000):
  """Return the windows of many seeds: `[seeds, 4]`."""
  seeds = tf.constant([[11, i] for i in range(seeds)])
  return window_sampler(size)(tf.constant((height, width, 3)), seeds).numpy()


@pytest.mark.parametrize('shape', [(300, 400), (61, 83), (500, 200), (9, 7)])
def test_distorted_windows_stay_within_their_limits(shape):
  y, x, height, width = distorted(*shape).T
  assert min(y.min(), x.min()) >= 0
  assert min(height.min(), width.min()) >= 1
  assert (y + height).max() <= shape[0]
  assert (x + width).max() <= shape[1]
  area = height * width / np.prod(shape)
  assert area.min() >= 0.1  # Not 8 %: a tenth of the image must be covered.
  assert area.max() <= 1
  # Sides are rounded.
  assert ((width + 0.5) / (height - 0.5)).min() >= 3 / 4
  assert ((width - 0.5) / (height + 0.5)).max() <= 4 / 3


def test_distorted_windows_reach_their_limits():
  y, x, height, width = distorted(300, 400).T
  area, aspect = height * width / 120000, width / height
  assert area.min() < 0.105
  assert area.max() > 0.95
  assert 0.35 < area.mean() < 0.55
  assert aspect.min() < 0.77
  assert aspect.max() > 1.3
  # Positions are uniform.
  down, right = y / np.maximum(300 - height, 1), x / np.maximum(400 - width, 1)
  for place in (down, right):
    assert place.min() < 0.02
    assert place.max() > 0.98
    assert abs(place.mean() - 1 / 2) < 0.04


def test_distorted_window_is_a_function_of_the_seed():
  windows = distorted(300, 400)
  np.testing.assert_array_equal(windows, distorted(300, 400))
  assert len(np.unique(windows, axis=0)) > 990


@pytest.mark.parametrize('shape', [(1, 1), (3, 2000), (2000, 3)])
@pytest.mark.parametrize('size', [32, 224])
def test_window_is_the_centre_if_none_fits(shape, size):
  windows = distorted(*shape, size, 20)
  centre = preprocess.centre_window(tf.constant((*shape, 3)), size)
  np.testing.assert_array_equal(windows, [centre] * 20)


def test_a_window_has_ten_attempts():
  windows = distorted(20, 200, seeds=4000)
  centre = preprocess.centre_window(tf.constant((20, 200, 3)), 224)
  share = (windows == centre.numpy()).all(axis=1).mean()
  assert abs(share - 0.75**10) < 0.01  # One attempt fails with 3/4.


@pytest.mark.parametrize(('size', 'window'), [(16, (1, 1)), (224, (1, 2))])
def test_window_is_the_centre_if_it_is_the_whole_image(size, window):
  windows = distorted(3, 3, size)
  assert (windows[:, 2:] < 3).any(axis=1).all()
  begin, side = window
  is_centre = windows == (begin, begin, side, side)
  assert is_centre.all(axis=1).mean() > 0.1
  assert (windows[:, 2:] == 3).any()  # One side may be whole.


@pytest.mark.parametrize(
  ('shape', 'size', 'margin', 'window'),
  [
    ((256, 256), 224, 32, (16, 16, 224, 224)),
    ((256, 300), 224, 32, (16, 38, 224, 224)),
    ((375, 500), 192, 32, (27, 90, 321, 321)),
    ((500, 375), 192, 32, (90, 27, 321, 321)),
    ((6, 9), 32, 0, (0, 2, 6, 6)),
    ((10, 11), 8, 2, (1, 2, 8, 8)),
    ((1, 1), 224, 32, (0, 0, 1, 1)),
    ((1, 7), 16, 32, (0, 3, 1, 1)),
  ],
)
def test_window_in_the_centre(shape, size, margin, window):
  ours = preprocess.centre_window(tf.constant((*shape, 3)), size, margin)
  assert ours.dtype == tf.int32
  np.testing.assert_array_equal(ours, window)


def test_window_in_the_centre_follows_its_rule():
  """The side is exact for all sizes; the default margin is 32."""
  shorter = np.arange(1, 700, dtype=np.int32)

  for size in (192, 256, 320, 416, 544):
    window = functools.partial(preprocess.centre_window, size=size)
    shapes = np.stack([shorter + 5, shorter, 3 + 0 * shorter], axis=1)
    windows = tf.function(functools.partial(tf.map_fn, window))
    y, x, height, width = windows(tf.constant(shapes)).numpy().T
    side = np.maximum(shorter * size // (size + 32), 1)
    np.testing.assert_array_equal(height, side)
    np.testing.assert_array_equal(width, side)
    # An odd rest is larger at the beginning.
    np.testing.assert_array_equal(y, -(-(shorter + 5 - side) // 2))
    np.testing.assert_array_equal(x, -(-(shorter - side) // 2))


def keys(distance):
  """Keys' cubic kernel, a = -1/2."""
  t = np.abs(distance)
  near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
  return np.where(t <= 1, near, np.where(t < 2, far, 0))


def bicubic(image, size):
  """Resize with half-pixel centres and weights renormalised at the border."""
  for axis in (0, 1):
    length = image.shape[axis]
    source = (np.arange(size)[:, None] + 0.5) * length / size - 0.5
    weights = keys(source - np.arange(length))
    weights /= weights.sum(axis=1, keepdims=True)
    image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
  return image


@pytest.mark.parametrize(
  ('shape', 'size', 'atol'),
  [
    ((48, 80), 32, 1e-2),
    ((12, 24), 32, 1e-2),
    ((5, 9), 32, 1e-2),
    ((300, 200), 64, 1e-2),
    ((32, 32), 32, 1e-2),
    # TensorFlow's kernel has 1024 steps; other ratios fall between them.
    ((61, 83), 45, 0.3),
    ((333, 500), 224, 0.3),
  ],
)
def test_resize_is_plain_bicubic(shape, size, atol):
  image = noise(*shape, 3)
  ours = preprocess.resize(image, size)
  assert ours.dtype == tf.float32
  np.testing.assert_allclose(ours, bicubic(image, size), atol=atol)


@pytest.mark.parametrize('name', ['jpeg', 'jpeg_420', 'png', 'gif', 'bmp'])
@pytest.mark.parametrize(
  ('shape', 'size', 'margin'),
  [((61, 83), 32, 32), ((83, 61), 17, 5), ((40, 40), 8, 0), ((3, 70), 16, 8)],
)
def test_squash_resizes_the_whole_image_and_cuts_the_margin(
  name, shape, size, margin
):
  encoded = ALL[name](photo(*shape))
  ours = preprocess.decode_and_crop(
    encoded, preprocessing.EvalPreprocessing(size, 'squash', margin)
  )
  assert ours.shape == (size, size, 3)
  whole = tf.io.decode_image(encoded, 3, expand_animations=False)
  resized = tf.image.resize(whole, [size + margin] * 2, 'bicubic')
  inner = slice(margin // 2, margin // 2 + size)
  np.testing.assert_array_equal(ours, resized[inner, inner])
  plain = bicubic(whole.numpy(), size + margin)[inner, inner]
  np.testing.assert_allclose(ours, plain, atol=0.3)


@pytest.mark.parametrize('name', ['jpeg', 'jpeg_grey', 'png', 'gif', 'bmp'])
@pytest.mark.parametrize(
  ('shape', 'size', 'margin'),
  [((61, 83), 32, 32), ((83, 61), 17, 5), ((40, 40), 8, 0), ((3, 70), 16, 8)],
)
def test_centre_crop_resizes_only_the_square(name, shape, size, margin):
  encoded = FORMATS[name](photo(*shape))
  ours = preprocess.decode_and_crop(
    encoded, preprocessing.EvalPreprocessing(size, 'centre', margin)
  )
  assert ours.shape == (size, size, 3)
  whole = tf.io.decode_image(encoded, 3, expand_animations=False).numpy()
  side = max(min(shape) * size // (size + margin), 1)
  y, x = ((length - side + 1) // 2 for length in shape)
  square = whole[y : y + side, x : x + side]
  resized = tf.image.resize(square, [size, size], 'bicubic')
  np.testing.assert_array_equal(ours, resized)
  np.testing.assert_allclose(ours, bicubic(square, size), atol=0.3)


def test_half_of_the_images_are_mirrored():
  image = noise(4, 5, 3)
  seeds = tf.constant([[2, i] for i in range(2000)])
  flips = tf.function(
    lambda: tf.map_fn(
      lambda seed: preprocess.random_flip(image, seed),
      seeds,
      fn_output_signature=tf.uint8,
    )
  )
  ours = flips().numpy()
  kept = (ours == image).all(axis=(1, 2, 3))
  mirrored = (ours == image[:, ::-1]).all(axis=(1, 2, 3))
  assert (kept ^ mirrored).all()
  assert abs(kept.mean() - 1 / 2) < 0.04
  np.testing.assert_array_equal(ours, flips())
