"""What people read: tables of plans, profiles and clusters, as `rich` renderables.

In: documents. Out: renderables that a console prints, or text. Every table has a title that names what it shows, every
number a unit. Imports no JAX.
"""
