"""The compiler as oracle: what XLA says of a program, beside what was predicted of it.

In: a lowered or compiled program, and the `Plan` or `LayerPlan` it came from. Out: its collectives and memory, and
every difference from the prediction. May import `cost`, `partition`, `trace`, `spec` and what is below them, and JAX;
not `runtime`, `search` or `profiler`.
"""
