"""Small documents for the tests of the documents."""

from galvatron_jax.spec.model import InputPort, Layer, LayerKind, ModelSpec, OutputPort, Parameter, PortRole
from galvatron_jax.spec.plan import LayerGroup, MeshAxis, Plan, Stage
from galvatron_jax.spec.program import Factor, FactorKind, Operation, Place, Program, RuleFactor, Value
from galvatron_jax.spec.strategy import LayerStrategy


def model_spec(num_layers: int = 4, *, name: str = "toy", fingerprint: str = "f00d") -> ModelSpec:
    """A model of equal layers, each one scaling by a parameter."""
    scale = RuleFactor(
        kind=FactorKind.PARALLEL, factor=0, operands=(Place(0, 0), None), results=(Place(dim=0, index=0),)
    )
    program = Program(
        factors=(Factor(size=8),),
        values=(Value(dims=((0,),), dtype="float32"), Value(dims=(), dtype="float32")),
        inputs=(0, 1),
        outputs=(0,),
        operations=(Operation(primitive="mul", operands=(0, 1), results=(0,), factors=(scale,), loop=(1, 2, 3)),),
    )
    kind = LayerKind(
        name="Scale",
        fingerprint="abc",
        program=program,
        inputs=(
            InputPort(role=PortRole.ACTIVATION, name="x", value=0),
            InputPort(role=PortRole.PARAMETER, name="w", value=1),
        ),
        outputs=(OutputPort(role=PortRole.ACTIVATION, name="y", value=0),),
        batch_factor=None,
    )
    return ModelSpec(
        name=name,
        fingerprint=fingerprint,
        microbatch=8,
        kinds=(kind,),
        layers=tuple(
            Layer(kind=0, name=f"blocks/{i}", inputs=(f"value:{i}", f"param:w{i}"), outputs=(f"value:{i + 1}",))
            for i in range(num_layers)
        ),
        parameters=tuple(Parameter(path=f"w{i}", shape=(), dtype="float32") for i in range(num_layers)),
    )


def plan(*groups: tuple[int, int, LayerStrategy], **changes: object) -> Plan:
    """A plan for `model_spec()` on 8 devices."""
    groups = groups or ((0, 1, LayerStrategy(dp=("a", "b", "c"))), (1, 4, LayerStrategy(dp=("a",), tp=("b", "c"))))
    stage = Stage(groups=tuple(LayerGroup(start=start, stop=stop, strategy=s) for start, stop, s in groups))
    fields = {
        "model": "toy",
        "model_fingerprint": "f00d",
        "mesh": tuple(MeshAxis(name=name, size=2) for name in "abc"),
        "global_batch": 64,
        "num_microbatches": 2,
        "stages": (stage,),
        "batch_axes": ("a",),
    }
    return Plan(**(fields | changes))
