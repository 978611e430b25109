"""Which forms of which networks the study times, in waves."""

from __future__ import annotations

from programs import FLAGS, FORMS, Group, INFER, PLAIN, TRAIN

# Placeholder for the fastest form of the first group.
BEST = 'best'
# Placeholder for the forms whose time in the first group was at most TOO_SLOW
# times the plain form's.
CONTENDERS, TOO_SLOW = 'contenders', 1.25
# Groups of a wave compile in parallel, and are timed once all have compiled.
WAVES = (
  [Group(TRAIN, 'nfnet_f0', 192, 64, [*FORMS])],
  [
    Group(TRAIN, 'nfnet_f0', 192, 128, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f3', 320, 32, [PLAIN, BEST]),
  ],
  [
    Group(
      TRAIN,
      'nfnet_f0',
      192,
      128,
      [PLAIN, BEST, 'fused blocks'],
    ),
    Group(TRAIN, 'resnet50', 224, 64, [PLAIN]),
    Group(INFER, 'nfnet_f0', 256, 64, [PLAIN, BEST]),
  ],
  [
    Group(TRAIN, 'nfnet_f0', 192, 256, [CONTENDERS]),
    Group(TRAIN, 'nfnet_f0', 192, 32, [CONTENDERS]),
    Group(TRAIN, 'nfnet_f1', 224, 64, [PLAIN, BEST]),
  ],
  [
    Group(
      TRAIN,
      'nfnet_f0',
      192,
      64,
      [PLAIN, BEST, *(f'{BEST}, {flag}' for flag in FLAGS)],
    ),
    Group(TRAIN, 'bn_resnet50', 224, 64, [PLAIN]),
    Group(INFER, 'nfnet_f0', 256, 64, [PLAIN, BEST], 'float32'),
  ],
  # Networks of the paper's tables 3 and 6, at its 32 images per device.
  [
    Group(TRAIN, 'nf_resnet50', 224, 32, [PLAIN]),
    Group(TRAIN, 'bn_resnet50', 224, 32, [PLAIN]),
    Group(TRAIN, 'efficientnet_b0', 224, 32, [PLAIN]),
  ],
  [
    Group(TRAIN, 'nfnet_f1', 224, 32, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f1_bn', 224, 32, [PLAIN]),
    Group(TRAIN, 'nfnet_f0', 192, 32, [PLAIN, BEST]),
    Group(TRAIN, 'nfnet_f0_bn', 192, 32, [PLAIN]),
    Group(TRAIN, 'efficientnet_b3', 300, 32, [PLAIN]),
  ],
)
_MINIATURE = 'nfnet_pico', 32, 8
QUICK = (
  [Group(TRAIN, *_MINIATURE, [*FORMS], 'float32')],
  [
    Group(TRAIN, 'senet_pico', 32, 8, [PLAIN], 'float32'),
    Group(TRAIN, *_MINIATURE, [PLAIN, f'{BEST}, NCHW'], 'float32'),
    Group(INFER, *_MINIATURE, [PLAIN, BEST], 'float32'),
  ],
  [
    Group(TRAIN, model, 32, 8, [PLAIN], 'float32')
    for model in ('efficientnet_pico', 'nfnet_pico_bn', 'bn_resnet_pico')
  ],
)
