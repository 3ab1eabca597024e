"""Drop-in replacements for the ConvMixers of other libraries: one import line changes.

* timm: ``register()`` of `compat.timm`, then ``timm.create_model("convmixer_fast_768_32")`` for
  ``timm.create_model("convmixer_768_32")``
* locuslab/convmixer: ``from convmixer_fast.compat.locuslab import ConvMixer``
* locuslab/convmixer-cifar10: ``from convmixer_fast.compat.locuslab_cifar10 import ConvMixer``
* mmpretrain: ``backbone=dict(type="ConvMixerFast")`` for ``backbone=dict(type="ConvMixer")``, and
  ``convmixer_fast.compat.mmpretrain`` in the config's ``custom_imports``

This package imports none of these libraries; each module imports its own when it is needed.
"""
