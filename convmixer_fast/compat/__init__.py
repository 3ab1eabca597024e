"""Which import line changes? One a library: each module here is a thin face of the one model.

* timm: ``register()`` of `compat.timm`, then ``timm.create_model("convmixer_fast_768_32")`` for
  ``timm.create_model("convmixer_768_32")``
* locuslab/convmixer: ``from convmixer_fast.compat.locuslab import ConvMixer``
* locuslab/convmixer-cifar10: ``from convmixer_fast.compat.locuslab_cifar10 import ConvMixer``
* mmpretrain: ``backbone=dict(type="ConvMixerFast")`` for ``backbone=dict(type="ConvMixer")``, and
  ``convmixer_fast.compat.mmpretrain`` in the config's ``custom_imports``

Nothing is imported here: each module asks for its library when it is used.
"""
