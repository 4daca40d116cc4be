"""Model families that transformers does not know: one file each, served without remote code.

A family has ``MODEL_TYPES`` (as in config.json) and ``register()``, which teaches them to the Auto
classes; `xtuner.models.load` calls it before a model of such a type is loaded.
"""
