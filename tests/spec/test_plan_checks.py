import pytest

from galvatron_jax.errors import PlanMismatchError
from galvatron_jax.spec.plan import MeshAxis, Schedule, Stage
from galvatron_jax.spec.plan_checks import check_plan
from galvatron_jax.spec.strategy import LayerStrategy, SequenceParallel
from tests.spec import samples

DATA = LayerStrategy(dp=("a", "b", "c"))


def faults(plan, *, model=None, num_devices=8):
    """The lines of the error."""
    with pytest.raises(PlanMismatchError) as caught:
        check_plan(plan, model or samples.model_spec(), num_devices)
    return [line.strip() for line in str(caught.value).splitlines()]


def test_a_fitting_plan_passes():
    check_plan(samples.plan(), samples.model_spec(), 8)
    check_plan(samples.plan(model_fingerprint=None), samples.model_spec(fingerprint="another"), 8)


def test_megatron_and_ulysses_axes_pass():
    megatron = LayerStrategy(dp=("a",), tp=("b", "c"), sp=("b", "c"), sp_kind=SequenceParallel.MEGATRON)
    ulysses = LayerStrategy(dp=("a",), tp=("b",), sp=("c",), sp_kind=SequenceParallel.ULYSSES, zero=3)
    check_plan(samples.plan((0, 2, megatron), (2, 4, ulysses)), samples.model_spec(), 8)


def test_a_single_device_needs_no_axes():
    check_plan(samples.plan((0, 4, LayerStrategy()), mesh=(), batch_axes=()), samples.model_spec(), 1)


def test_another_number_of_devices_is_named():
    assert faults(samples.plan(), num_devices=4) == [
        "This plan for 'toy' cannot train 'toy' on 4 devices:",
        "mesh: a=2 x b=2 x c=2 makes 8 devices, but there are 4; search anew for these.",
    ]


def test_another_model_is_named_with_what_differs():
    lines = faults(samples.plan(), model=samples.model_spec(6, name="other", fingerprint="beef"))
    assert lines == [
        "This plan for 'toy' cannot train 'other' on 8 devices:",
        "model_fingerprint: the plan was made for f00d, this model is beef; what differs: its name ('toy' in the plan, "
        "'other' here) and its number of layers (4 in the plan, 6 here). Search anew, or remove model_fingerprint to "
        "use the plan all the same.",
        "stages: layers 4 to 5 are in no group; the model has 6 layers.",
    ]
    lines = faults(samples.plan(), model=samples.model_spec(fingerprint="beef"))
    assert "what differs: its operations, shapes or dtypes (name and number of layers agree)" in lines[1]


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(1, 4)], "stages[0].groups[0]: starts at layer 1; layer 0 is in no group."),
        ([(0, 1), (3, 4)], "stages[0].groups[1]: starts at layer 3; layers 1 to 2 are in no group."),
        ([(0, 3)], "stages: layer 3 is in no group; the model has 4 layers."),
        ([(0, 5)], "stages: the groups end after layer 4, but the model's last layer is 3."),
        (
            [(0, 3), (2, 4)],
            "stages[0].groups[1]: starts at layer 2, but the groups before it reach layer 2; "
            "groups must follow each other without overlap.",
        ),
        ([(0, 4), (4, 4)], "stages[0].groups[1]: holds no layers (start 4, stop 4)."),
    ],
)
def test_layers_must_be_in_one_group_each(ranges, message):
    plan = samples.plan(*((start, stop, DATA) for start, stop in ranges))
    assert faults(plan)[1:] == [message]


def test_axes_that_the_mesh_lacks_are_named():
    plan = samples.plan((0, 4, LayerStrategy(dp=("a", "x"), tp=("B",))), batch_axes=("a", "data"))
    assert faults(plan)[1:] == [
        "batch_axes: the mesh has no axis 'data'. Known: a, b, c.",
        "stages[0].groups[0].strategy.dp: the mesh has no axis 'x'. Known: a, b, c.",
        "stages[0].groups[0].strategy.tp: the mesh has no axis 'B'. Did you mean 'b'?",
    ]
    plan = samples.plan((0, 4, LayerStrategy(dp=("a",))), mesh=(), batch_axes=())
    assert faults(plan, num_devices=1)[1:] == [
        "stages[0].groups[0].strategy.dp: the mesh has no axis 'a'. The mesh has no axes."
    ]


def test_an_axis_that_serves_twice_is_named():
    twice = LayerStrategy(dp=("a", "a"))
    lines = faults(samples.plan((0, 1, twice), (1, 4, DATA), batch_axes=("b", "b")))
    assert lines[1:] == [
        "stages[0].groups[0].strategy: axis a serves more than once (dp[a,a]); each axis may serve one kind.",
        "batch_axes: b, b names an axis twice.",
    ]


@pytest.mark.parametrize(
    ("axes", "num_devices", "message"),
    [
        ([("a", 4)], 4, "mesh[0].size: axis 'a' has size 4, which is not prime; use 2 axes of sizes 2, 2."),
        ([("a", 2), ("b", 1)], 2, "mesh[1].size: axis 'b' has size 1, which is not prime; leave it out."),
        ([("a", 2), ("a", 3)], 6, "mesh: the axis name 'a' is used 2 times."),
        (
            [("a", 2, "intra"), ("b", 2, "inter")],
            4,
            "mesh: axes of level 'inter' (between nodes, the slowest links) must come before those of level 'intra'.",
        ),
        ([("a", 2, "intr")], 2, "mesh[0].level: 'intr' is no link level. Did you mean 'intra'?"),
    ],
)
def test_mesh_axes_must_be_prime_distinct_and_slowest_first(axes, num_devices, message):
    mesh = tuple(MeshAxis(**dict(zip(("name", "size", "level"), axis, strict=False))) for axis in axes)
    plan = samples.plan((0, 4, LayerStrategy()), mesh=mesh, batch_axes=())
    assert faults(plan, num_devices=num_devices)[1:] == [message]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch": 63},
            "global_batch: 63 examples do not divide into 2 micro-batches; use 62 or 64 examples.",
        ),
        (
            {"global_batch": 24, "num_microbatches": 2},
            "stages[0].groups[0].strategy.dp: micro-batches of 12 examples (24 in 2) do not divide over 8 devices; "
            "make global_batch a multiple of 16, or use fewer micro-batches.",
        ),
        ({"global_batch": 0}, "global_batch 0 and num_microbatches 2: both must be at least 1."),
    ],
)
def test_the_batch_must_divide(changes, message):
    assert faults(samples.plan(**changes))[1:] == [message]


def pipeline(count: int = 2, **changes):
    """A plan of four layers in `count` stages, by default along the first axis of the mesh."""
    size = 4 // count
    inner = LayerStrategy(dp=("b", "c"))
    stages = tuple(samples.plan((k * size, (k + 1) * size, inner)).stages[0] for k in range(count))
    fields = {"stages": stages, "pipeline_axes": ("a",), "batch_axes": ("b",), "schedule": Schedule.ONE_F_ONE_B}
    return samples.plan(**(fields | changes))


def test_pipelines_pass():
    check_plan(pipeline(), samples.model_spec(), 8)
    check_plan(pipeline(4, schedule=Schedule.INTERLEAVED), samples.model_spec(), 8)
    replicated = tuple(samples.plan((k, k + 1, LayerStrategy())).stages[0] for k in range(4))
    both = pipeline(stages=replicated, pipeline_axes=("a", "b"), batch_axes=(), schedule=Schedule.GPIPE)
    check_plan(both, samples.model_spec(), 8)


@pytest.mark.parametrize(
    ("count", "changes", "messages"),
    [
        (
            2,
            {"schedule": Schedule.NONE},
            [
                "schedule: 'none' runs one stage, but the plan has 2; use one of 'gpipe', '1f1b', '1f1b-stash', "
                "'interleaved'."
            ],
        ),
        (
            2,
            {"pipeline_axes": ()},
            ["pipeline_axes: missing; 2 stages lie along the first axes of the mesh, which must be named."],
        ),
        (
            4,
            {},
            [
                "stages: 4 stages do not fit 2 groups of devices (pipeline_axes a); make 2, or use 'interleaved' with "
                "a "
                "multiple."
            ],
        ),
        (
            2,
            {"schedule": Schedule.INTERLEAVED},
            [
                "stages: 2 stages do not fit 2 groups of devices (pipeline_axes a); 'interleaved' needs the same "
                "number "
                "on each, at least 2: 4, 6, ..."
            ],
        ),
        (
            2,
            {"pipeline_axes": ("c",), "batch_axes": ("b",)},
            [
                "pipeline_axes: c must be the first axes of the mesh, in its order, for stages lie along the slowest "
                "links; here that is a.",
                *(
                    f"stages[{k}].groups[0].strategy: stages lie along c (pipeline_axes); spread each over the other "
                    "axes only."
                    for k in range(2)
                ),
            ],
        ),
        (
            2,
            {"batch_axes": ("a",)},
            ["batch_axes: stages lie along a (pipeline_axes); spread each over the other axes only."],
        ),
        (
            2,
            {"pipeline_axes": ("A",)},
            ["pipeline_axes: the mesh has no axis 'A'. Did you mean 'a'?"],
        ),
        (
            2,
            {"pipeline_axes": ("a", "a")},
            [
                "pipeline_axes: a, a names an axis twice.",
                "pipeline_axes: a, a must be the first axes of the mesh, in its order, for stages lie along the "
                "slowest links; here that is a, b.",
            ],
        ),
    ],
)
def test_stages_must_fill_the_leading_axes_as_the_schedule_wants(count, changes, messages):
    assert faults(pipeline(count, **changes))[1:] == messages


def test_one_stage_takes_no_axes_and_no_schedule():
    plan = samples.plan((0, 4, LayerStrategy(dp=("b", "c"))), pipeline_axes=("a",), batch_axes=("b",))
    assert faults(plan)[1:] == ["pipeline_axes: stages lie along a, but the plan has one stage; leave it empty."]
    assert faults(samples.plan(executor="locl", schedule=Schedule.GPIPE))[1:] == [
        "schedule: 'gpipe' orders several stages, but the plan has one; use 'none'.",
        "executor: no executor 'locl'. Did you mean 'local'?",
    ]
    assert faults(samples.plan(stages=(Stage(groups=()),)))[1:] == [
        "stages: layers 0 to 3 are in no group; the model has 4 layers.",
        "stages[0]: holds no layers.",
    ]


def test_the_annotate_executor_runs_one_stage():
    assert "executor: `annotate` runs plans of one stage, this one has 2; use `local`." in faults(
        pipeline(2, executor="annotate")
    )


def test_gradients_are_summed_in_a_type_that_is_not_wider_than_theirs():
    assert faults(samples.plan(gradient_sum_dtype="bfloat8"))[1:] == [
        "gradient_sum_dtype: 'bfloat8' is no type to sum gradients in. Did you mean 'bfloat16'?"
    ]
    assert faults(samples.plan(gradient_sum_dtype="float64", executor="annotate"))[1:] == [
        "gradient_sum_dtype: float64 is not narrower than the gradients, which are float32; use None.",
        "gradient_sum_dtype: `annotate` leaves it to XLA in which type gradients are summed; use `local`, or None.",
    ]
    for dtype in ("float32", "bfloat16", "float16"):
        check_plan(samples.plan(gradient_sum_dtype=dtype), samples.model_spec(), 8)


@pytest.mark.parametrize("ending", ["json", "toml"])
def test_pipelines_keep_their_shape_in_files_and_differ_by_place(tmp_path, ending):
    plan = pipeline(4, schedule=Schedule.INTERLEAVED)
    plan.save(tmp_path / f"plan.{ending}")
    again = type(plan).load(tmp_path / f"plan.{ending}")
    assert again == plan
    assert again.pipeline_degree == 2
    assert [axis.name for axis in again.stage_mesh] == ["b", "c"]
    assert plan.diff(pipeline(4, schedule=Schedule.GPIPE, pipeline_axes=("a", "b"))) == [
        "schedule: 'interleaved' -> 'gpipe'",
        "pipeline_axes: ['a'] -> ['a', 'b']",
    ]


def test_every_fault_is_named_at_once():
    plan = samples.plan(
        (0, 3, LayerStrategy(dp=("z",))), global_batch=65, executor="xla", mesh=(MeshAxis(name="a", size=6),)
    )
    places = [line.partition(":")[0] for line in faults(plan)[1:]]
    assert places == [
        "mesh",
        "mesh[0].size",
        "stages",
        "stages[0].groups[0].strategy.dp",
        "global_batch",
        "executor",
    ]
