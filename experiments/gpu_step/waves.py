"""Which forms of which networks the study times, in waves.

The programs of a wave compile first, and are timed once all have compiled.
"""

from __future__ import annotations

from programs import FLAGS, FORMS, Group, INFER, PLAIN, TIMM, TRAIN

# Placeholder for the fastest form of the rows so far.
BEST = 'best'
WAVES = {
  'forms': [Group(TRAIN, 'nfnet_f0', 192, 64, [*FORMS])],
  'sizes': [
    Group(TRAIN, 'nfnet_f0', 192, 128, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f3', 320, 32, [PLAIN, BEST]),
  ],
  'flags': [
    Group(TIMM, 'nfnet_f0', 192, 128, ['compiled']),
    Group(
      TRAIN,
      'nfnet_f0',
      192,
      128,
      [PLAIN, BEST, *(f'{BEST}, {flag}' for flag in [*FLAGS][:2])],
    ),
  ],
  'layouts': [
    Group(
      TRAIN,
      'nfnet_f0',
      192,
      128,
      [PLAIN, *(f'{BEST}, {flag}' for flag in [*FLAGS][2:])],
    ),
  ],
  'timm': [
    Group(
      TIMM,
      'nfnet_f0',
      192,
      128,
      ['eager', 'eager channels-last', 'compiled', 'compiled channels-last'],
    )
  ],
  'inference': [
    Group(INFER, 'nfnet_f0', 256, 64, [PLAIN, BEST]),
    Group(INFER, 'nfnet_f0', 256, 64, [PLAIN, BEST], 'float32'),
  ],
  'more inference': [
    Group(INFER, 'nfnet_f1', 320, 64, [PLAIN, BEST]),
    Group(INFER, 'nfnet_f3', 416, 32, [PLAIN, BEST]),
    Group(INFER, 'eca_nfnet_l0', 288, 64, [PLAIN]),
    Group(INFER, 'bn_resnet50', 224, 64, [PLAIN]),
    Group(INFER, 'efficientnet_b0', 224, 64, [PLAIN]),
    Group(INFER, 'efficientnet_b3', 300, 64, [PLAIN]),
  ],
  'batches': [
    Group(TRAIN, 'nfnet_f0', 192, 256, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f0', 192, 32, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f1', 224, 64, [PLAIN, BEST]),
  ],
  'networks': [
    Group(TRAIN, 'bn_resnet50', 224, 64, [PLAIN]),
    Group(TRAIN, 'nfnet_l0', 224, 64, [PLAIN]),
    Group(TRAIN, 'eca_nfnet_l0', 224, 64, [PLAIN]),
    Group(TRAIN, 'efficientnet_b0', 224, 64, [PLAIN]),
  ],
  # Networks of the paper's tables 3 and 6, at its 32 images per device.
  'table 3': [
    Group(TRAIN, 'nf_resnet50', 224, 32, [PLAIN]),
    Group(TRAIN, 'bn_resnet50', 224, 32, [PLAIN]),
    Group(TRAIN, 'efficientnet_b0', 224, 32, [PLAIN]),
  ],
  'table 6': [
    Group(TRAIN, 'nfnet_f1', 224, 32, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f1_bn', 224, 32, [PLAIN]),
    Group(TRAIN, 'nfnet_f0', 192, 32, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f0_bn', 192, 32, [PLAIN]),
    Group(TRAIN, 'efficientnet_b3', 300, 32, [PLAIN]),
  ],
}
_MINIATURE = 'nfnet_pico', 32, 8
QUICK = {
  'forms': [Group(TRAIN, *_MINIATURE, [*FORMS], 'float32')],
  'flags': [
    Group(TIMM, *_MINIATURE, ['eager'], 'float32'),
    Group(TRAIN, 'senet_pico', 32, 8, [PLAIN], 'float32'),
    Group(TRAIN, *_MINIATURE, [PLAIN, f'{BEST}, NCHW'], 'float32'),
    Group(INFER, *_MINIATURE, [PLAIN, BEST], 'float32'),
    Group(INFER, 'efficientnet_pico', 32, 8, [PLAIN], 'float32'),
  ],
  'networks': [
    Group(TRAIN, model, 32, 8, [PLAIN], 'float32')
    for model in (
      'efficientnet_pico',
      'nfnet_pico_bn',
      'bn_resnet_pico',
      'eca_nfnet_pico',
    )
  ],
}
