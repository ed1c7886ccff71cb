"""A plan made to run.

In: a traced model, a `Plan` and an optax optimizer. Out: one jitted train step with its state, born sharded; and around
it what training needs: data, metrics, checkpoints and the loop itself. May import `trace`, `partition`, `spec` and what
is below them, and JAX; not `search`.
"""
