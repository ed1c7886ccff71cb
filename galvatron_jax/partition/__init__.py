"""What a strategy means for one layer.

In: a `LayerKind`, a `LayerStrategy` and the mesh. Out: a `LayerPlan`: the layout of every value, collectives with bytes
and groups, local FLOPs and bytes, residuals. The cost model prices it and the runtime emits it, so what is predicted is
what runs. May import `spec`, `errors` and `units`; never JAX.
"""
