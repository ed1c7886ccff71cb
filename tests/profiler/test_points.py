"""Few points that pin the curves, the most telling first."""

import itertools

from galvatron_jax.profiler import choose_points
from galvatron_jax.spec.model import Layer, LayerKind, ModelSpec
from galvatron_jax.spec.program import Factor, FactorRole, Program
from galvatron_jax.spec.strategy import LayerStrategy, Remat, SequenceParallel

MESH = {"a": 2, "b": 2, "c": 2}


def kind(name, *, hidden=True):
    roles = [FactorRole.BATCH, FactorRole.EMBEDDING] + [FactorRole.HIDDEN] * hidden
    program = Program(
        factors=tuple(Factor(size=8, role=role) for role in roles), values=(), inputs=(), outputs=(), operations=()
    )
    return LayerKind(name=name, fingerprint=f"fp-{name}", program=program, inputs=(), outputs=(), batch_factor=0)


def model(*names, kinds=None):
    kinds = kinds or tuple(kind(name) for name in dict.fromkeys(names))
    index = {each.name: position for position, each in enumerate(kinds)}
    layers = tuple(
        Layer(kind=index[name], name=f"{name}/{position}", inputs=(), outputs=()) for position, name in enumerate(names)
    )
    return ModelSpec(name="m", fingerprint="f", microbatch=8, kinds=kinds, layers=layers, parameters=())


def strategies():
    axes = tuple(MESH)
    for cut in range(4):
        dp, rest = axes[:cut], axes[cut:]
        for zero, remat in itertools.product((0, 1, 2, 3), Remat):
            yield LayerStrategy(dp=dp, tp=rest, zero=zero, remat=remat)
            if rest:
                yield LayerStrategy(dp=dp, tp=rest, sp=rest, sp_kind=SequenceParallel.MEGATRON, zero=zero, remat=remat)
                yield LayerStrategy(dp=dp, sp=rest, sp_kind=SequenceParallel.ULYSSES, zero=zero, remat=remat)
    yield LayerStrategy(tp=("c",))


def asked(requests, name="Block"):
    return {
        (r.shape.batch, r.shape.tp, r.shape.sp, str(r.shape.sp_kind), str(r.remat)) for r in requests if r.name == name
    }


def test_a_repeated_kind_is_timed_at_every_tp_degree_and_at_the_corners():
    requests = choose_points(
        model("embed", "Block", "Block", "head"), list(strategies()), mesh=MESH, microbatches=[8, 32]
    )
    assert asked(requests) == {
        (4, 1, 1, "none", "none"),
        (1, 1, 1, "none", "none"),
        (4, 1, 1, "none", "full"),
        (4, 1, 1, "none", "dots"),
        (4, 1, 1, "none", "attention"),
        (8, 2, 1, "none", "none"),
        (16, 4, 1, "none", "none"),
        (32, 8, 1, "none", "none"),
        (8, 8, 1, "none", "none"),
        (32, 1, 8, "ulysses", "none"),
        (32, 8, 8, "megatron", "none"),
    }
    assert (
        asked(requests, "head")
        == asked(requests, "embed")
        == {
            (4, 1, 1, "none", "none"),
            (32, 8, 1, "none", "none"),
        }
    )


def test_the_most_telling_points_come_first_and_the_rest_can_be_dropped():
    arguments = {"mesh": MESH, "microbatches": [8, 32]}
    whole = choose_points(model("embed", "Block", "Block"), list(strategies()), **arguments)
    few = choose_points(model("embed", "Block", "Block"), list(strategies()), max_points=4, **arguments)
    assert few == whole[:4]
    assert {request.name for request in few} == {"embed", "Block"}


def test_each_request_carries_a_strategy_that_gives_its_shape():
    for request in choose_points(model("Block"), list(strategies()), mesh=MESH, microbatches=[8, 16]):
        dp = 2 ** len(request.strategy.dp)
        assert request.shape.batch * dp == request.microbatch
        assert request.shape.tp == 2 ** len(request.strategy.tp)
        assert request.shape.sp == 2 ** len(request.strategy.sp)
        assert request.strategy.remat is request.remat
        assert request.strategy.zero == 0


def test_a_kind_without_hidden_dims_is_not_timed_under_tp():
    norm = kind("norm", hidden=False)
    requests = choose_points(model("norm", "norm", kinds=(norm,)), list(strategies()), mesh=MESH, microbatches=[8])
    assert {request.shape.tp for request in requests} == {1}


def test_micro_batches_that_do_not_divide_are_left_out():
    requests = choose_points(model("Block"), [LayerStrategy(dp=("a", "b", "c"))], mesh=MESH, microbatches=[12, 16])
    assert {request.shape.batch for request in requests} == {2}


def test_axes_without_work_are_considered_only_where_all_strategies_have_some():
    lazy = LayerStrategy(tp=("c",))
    requests = choose_points(model("Block"), [lazy], mesh=MESH, microbatches=[8])
    assert {(request.shape.batch, request.shape.tp) for request in requests} == {(8, 2)}


def test_stages_of_a_pipeline_widen_the_range_of_local_batches():
    own = [s for s in strategies() if s != LayerStrategy(tp=("c",))]
    stage = [LayerStrategy(dp=dp, tp=tp) for dp, tp in [(("b", "c"), ()), (("b",), ("c",)), ((), ("b", "c"))]]
    requests = choose_points(
        model("Block", "Block"), own + stage, mesh=MESH, microbatches=[4, 8, 16, 32], stages=["abc", "bc"]
    )
    unsplit = {shape for shape in asked(requests) if shape[1:3] == (1, 1)}
    assert unsplit == {
        (8, 1, 1, "none", "none"),
        (4, 1, 1, "none", "none"),
        (1, 1, 1, "none", "none"),
        (4, 1, 1, "none", "full"),
        (4, 1, 1, "none", "dots"),
        (4, 1, 1, "none", "attention"),
    }
    assert {(16, 2), (32, 4), (32, 8)} <= {shape[:2] for shape in asked(requests)}


def test_the_batch_of_pure_data_parallelism_is_timed_and_remat_only_where_it_is_searched():
    plain = [LayerStrategy(dp=dp) for dp in ((), ("a",), ("a", "b"), ("a", "b", "c"))]
    requests = choose_points(
        model("Block", "Block"), plain, mesh=MESH, microbatches=[8, 32], stages=["", "a", "ab", "abc"]
    )
    assert [(request.shape.batch, request.remat) for request in requests] == [
        (32, Remat.NONE),
        (1, Remat.NONE),
        (8, Remat.NONE),
        (4, Remat.NONE),
    ]


def test_no_strategy_gives_no_point():
    assert choose_points(model("Block"), [], mesh=MESH, microbatches=[8]) == []
