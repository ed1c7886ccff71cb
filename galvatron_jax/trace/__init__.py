"""From any Flax model to a `ModelSpec`.

In: a model, concrete or abstract, its loss function and an example batch. Out: the `ModelSpec`, in which each distinct
layer is once described by its operations, and beside it the live jaxprs that the runtime binds. May import `spec`,
`errors`, `units` and JAX.
"""
