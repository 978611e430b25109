"""Writes the pages of the model families, from the table of models.

python docs/site/model_pages.py
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

import jax

from nfnet_jax import trees
from nfnet_jax.models import classifier, complexity, registry

_PAPER = 'arXiv 2102.06171'
FOLDER = pathlib.Path(__file__).parents[1] / 'models'
_TRAIN = (
  '.venv/bin/python -m nfnet_jax.experiments.train --config={config} '
  '--config.run.data_dir=datasets --workdir=runs/{name}'
)
_PREDICT = (
  '.venv/bin/python -m nfnet_jax.experiments.predict --weights={weights} photos'
)


class Page(NamedTuple):
  """What the table of models does not say about a family.

  Attributes:
    title: heading of the page.
    text: what the networks are, with the paper.
    config: config that trains the example.
    example: model that the commands are about.
    weights: published weights, or '' where this project trains them itself.
    licence: who publishes weights, and how.
  """

  title: str
  text: str
  config: str
  example: str
  weights: str = ''
  licence: str = (
    'No weights are published under these parameter names. The second command '
    'takes those of the run.'
  )


PAGES = {
  'NFNet': Page(
    'NFNet',
    'Residual networks without normalisation: weight standardisation, '
    'branches scaled by the expected variance, and AGC in training. F0 to F7 '
    'differ in depth and image size, and `_plus` is wider. Models that end in '
    '`_baseline`, `_modified_width` and `_default_width` are those of the '
    'ablation from SE-ResNeXt-D to NFNet, table 2 '
    '([reproduce.md](../reproduce.md)). F6 was trained with SAM. '
    '[arXiv 2102.06171](https://arxiv.org/abs/2102.06171), section 5.',
    'f0',
    'nfnet_f0',
    'F0',
    'The weights of F0 to F6 are published by the authors; this project does '
    'not contain them. timm publishes the same weights, and its model cards '
    '(`timm/dm_nfnet_f0.dm_in1k` to `f6`) state Apache-2.0.',
  ),
  'BNNFNet': Page(
    'NFNet with batch normalisation',
    'The same widths, depths and regularisation with batch normalisation '
    'before every activation, to measure what normalisation costs. '
    '[arXiv 2102.06171](https://arxiv.org/abs/2102.06171), table 6, which '
    'names these networks without specifying them; the docstring of `BNNFNet` '
    'lists what was chosen here.',
    'ladder:f0_bn',
    'nfnet_f0_bn',
  ),
  'LightNFNet': Page(
    'Light NFNet',
    "timm's lighter NFNets: bottlenecks of a quarter of the width, groups of "
    '64 channels, SiLU, and squeeze-excite (`nfnet_l0`) or ECA '
    '([arXiv 1910.03151](https://arxiv.org/abs/1910.03151)). They compute what '
    "timm's networks of the same names do "
    '(`experiments/timm_parity/README.md`). There is no paper.',
    'light_nfnet:eca_nfnet_l0',
    'eca_nfnet_l0',
    'eca_nfnet_l0',
    'timm publishes weights of `nfnet_l0` and of `eca_nfnet_l0` to `l2`, as '
    '`timm/nfnet_l0.ra2_in1k`, `timm/eca_nfnet_l0.ra2_in1k`, '
    '`timm/eca_nfnet_l1.ra2_in1k` and `timm/eca_nfnet_l2.ra3_in1k` on the '
    'Hugging Face hub; their pages there state the licence. This project does '
    "not contain them. Fetching them needs `pip install '.[hub]'`.",
  ),
  'NFResNet': Page(
    'NF-ResNet',
    'Pre-activation ResNets without normalisation, from which NFNets came. '
    '[arXiv 2101.08692](https://arxiv.org/abs/2101.08692); trained with AGC in '
    '[arXiv 2102.06171](https://arxiv.org/abs/2102.06171), section 4. The '
    'authors report their accuracies in figures only.',
    'resnet:nf_resnet50',
    'nf_resnet50',
  ),
  'FixUpResNet': Page(
    'FixUp ResNet',
    'Post-activation ResNets that train without normalisation by their '
    'initialisation, with scalar biases and scales. '
    '[arXiv 1901.09321](https://arxiv.org/abs/1901.09321), in the form that '
    'the authors of NF-ResNets released.',
    'resnet:fixup_resnet50',
    'fixup_resnet50',
  ),
  'SkipInitResNet': Page(
    'SkipInit ResNet',
    'Pre-activation ResNets whose branches are multiplied by a learnt gain '
    'that starts at 0, and have no other change. '
    '[arXiv 2002.10444](https://arxiv.org/abs/2002.10444), in the form that '
    'the authors of NF-ResNets released.',
    'resnet:skipinit_resnet50',
    'skipinit_resnet50',
  ),
  'NFRegNet': Page(
    'NF-RegNet',
    'RegNets without normalisation, scaled as EfficientNets are. '
    '[arXiv 2101.08692](https://arxiv.org/abs/2101.08692), appendix. No source '
    'that we know reports the accuracy of these variants.',
    'nf_regnet:b0',
    'nf_regnet_b0',
  ),
  'BNResNet': Page(
    'Pre-activation ResNet',
    'Batch-normalised ResNets (v2), the counterparts of NF-ResNets. '
    '[arXiv 1603.05027](https://arxiv.org/abs/1603.05027).',
    'resnet:bn_resnet50',
    'bn_resnet50',
  ),
  'ResNetV1': Page(
    'ResNet-50 and SENet-50',
    "The post-activation baselines of the paper's table 3, with the stride "
    'in the 3x3 convolution. '
    '[arXiv 1512.03385](https://arxiv.org/abs/1512.03385) and '
    '[arXiv 1709.01507](https://arxiv.org/abs/1709.01507).',
    'resnet:resnet50',
    'resnet50',
  ),
  'EfficientNet': Page(
    'EfficientNet',
    'The baselines that NFNets are compared with. '
    '[arXiv 1905.11946](https://arxiv.org/abs/1905.11946); accuracies as in '
    'table 3 of [arXiv 2102.06171](https://arxiv.org/abs/2102.06171), whose '
    'authors trained them with RandAugment.',
    'efficientnet:b0',
    'efficientnet_b0',
  ),
}


def page(family: type[classifier.ImageClassifier]) -> str:
  """Return a family's page."""
  facts = PAGES[family.__name__]
  names = list(registry.FAMILIES[family].values())
  commands = [_TRAIN.format(config=facts.config, name=facts.example)]
  commands.append(
    _PREDICT.format(weights=facts.weights or f'runs/{facts.example}')
  )
  return '\n'.join(
    [
      f'# {facts.title}',
      '',
      '<!-- Written by docs/site/model_pages.py. -->',
      '',
      facts.text,
      '',
      *_table(names),
      '',
      'Parameters are those for 1,000 classes, multiply-adds those of one '
      'image at the test size, and top-1 is the reported ImageNet accuracy in '
      f'%, with its source: tables are those of {_PAPER}.',
      '',
      f'Train and use `{facts.example}` (see [imagenet.md](../imagenet.md) for '
      'the dataset):',
      '',
      '```sh',
      *commands,
      '```',
      '',
      facts.licence,
      '',
      *_parameters(min(names, key=_size)),
      '',
    ]
  )


def _size(name: str) -> int:
  return complexity.count_model(name)[0]


def _table(names: list[str]) -> list[str]:
  lines = [
    '| model | parameters | G multiply-adds | px, train | px, test | top-1 |',
    '| --- | ---: | ---: | ---: | ---: | --- |',
  ]
  for name in names:
    spec = registry.get_model_spec(name)
    parameters, macs = complexity.count_model(name)
    top1 = spec.reported_top1
    source = spec.source.removeprefix(f'{_PAPER}, ')
    reported = f'{top1} ({source})' if top1 else '-'
    lines.append(
      f'| `{name}` | {parameters:,} | {macs / 1e9:.3f} | {spec.train_size} | '
      f'{spec.test_size} | {reported} |'
    )
  return lines


def _parameters(name: str) -> list[str]:
  """Return the paths and shapes of a network up to its second block."""
  model = registry.create_model(name)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), 'float32')
  init = lambda key, images: model.init(key, images, False)
  params, _ = jax.eval_shape(init, jax.random.key(0), images)
  shapes = {
    path: leaf.shape
    for path, leaf in trees.named_leaves(params)
    if not re.search(r'_\d+(/~/(?!linear)|/skip_gain)', path)
  }
  width = max(map(len, shapes))
  return [
    f'The parameters of `{name}`. Those of its first block are shown; further '
    'blocks have a number behind the name. All variants have the same names.',
    '',
    '```',
    *(f'{path:<{width}}  {list(shape)}' for path, shape in shapes.items()),
    '```',
  ]


def path_of(family: type[classifier.ImageClassifier]) -> pathlib.Path:
  """Return where a family's page lies."""
  return FOLDER / f'{family.__name__.lower()}.md'


def main() -> None:
  """Write all pages."""
  for family in registry.FAMILIES:
    path_of(family).write_text(page(family))


if __name__ == '__main__':
  main()
