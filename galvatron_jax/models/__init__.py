"""A zoo of ordinary Flax NNX models: no sharding annotation, no parallel code, nothing else of galvatron_jax imported.

One file a family. Each has a frozen ``…Config``, a module class ``(config, *, rngs)``, ``loss_fn(model, batch)``,
``example_batch(config, batch_size)`` (shapes only), ``random_batch(config, batch_size, seed=…)`` (NumPy) and
``PRESETS``: the sizes that papers published, and a ``tiny`` one for tests. ``registry`` finds all of it by name.
"""
