"""Model families that transformers does not support, one file each, without remote code.

A family has ``MODEL_TYPES`` (as in config.json) and ``register()``, which adds them to the Auto
classes; `xtuner.models.load` calls it before loading a model of this type.
"""
