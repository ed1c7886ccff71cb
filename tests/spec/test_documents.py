import json
import stat
import string
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from galvatron_jax.errors import DocumentError, InputError
from galvatron_jax.spec import ClusterSpec, Document, LayerStrategy, ModelSpec, Plan, Profile
from galvatron_jax.spec.cluster import DeviceSpec, Link
from galvatron_jax.spec.files import format_json, parse_json
from galvatron_jax.spec.plan import LayerGroup, MemoryBreakdown, MeshAxis, Prediction, Schedule, Stage, TimeBreakdown
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import (
    CollectiveKind,
    CollectiveTiming,
    LayerTiming,
    LocalShape,
    Provenance,
    Timing,
)
from galvatron_jax.spec.strategy import Remat, SequenceParallel
from galvatron_jax.spec.toml import format_toml
from galvatron_jax.spec.validation import validate
from tests.spec import samples

# Any text and number a document can meet, in keys too.
texts = st.text(max_size=12)
counts = st.integers(1, 10**15)
seconds = st.floats(0, 1e6)
rates = st.floats(1e-3, 1e20)
axis_names = st.lists(st.sampled_from(string.ascii_lowercase), unique=True, max_size=6).map(tuple)


@st.composite
def layer_strategies(draw):
    names = draw(axis_names)
    first, second = sorted((draw(st.integers(0, len(names))), draw(st.integers(0, len(names)))))
    dp, tp, rest = names[:first], names[first:second], names[second:]
    kinds = [SequenceParallel.NONE]
    kinds += [SequenceParallel.MEGATRON] * bool(tp) + [SequenceParallel.ULYSSES] * bool(rest)
    kind = draw(st.sampled_from(kinds))
    sp = {SequenceParallel.NONE: (), SequenceParallel.MEGATRON: tp, SequenceParallel.ULYSSES: rest}[kind]
    return LayerStrategy(
        dp=dp, tp=tp, sp=sp, sp_kind=kind, zero=draw(st.integers(0, 3)), remat=draw(st.sampled_from(Remat))
    )


timings = st.builds(Timing, median_s=seconds, spread_s=seconds, samples=counts)
plans = st.builds(
    Plan,
    model=texts,
    model_fingerprint=st.none() | texts,
    mesh=st.lists(st.builds(MeshAxis, name=texts, size=counts), max_size=3).map(tuple),
    global_batch=counts,
    num_microbatches=counts,
    schedule=st.sampled_from(Schedule),
    stages=st.lists(
        st.lists(
            st.builds(LayerGroup, start=counts, stop=counts, strategy=layer_strategies()), min_size=1, max_size=2
        ).map(lambda groups: Stage(groups=tuple(groups))),
        max_size=2,
    ).map(tuple),
    batch_axes=axis_names,
    prediction=st.none()
    | st.builds(
        Prediction,
        time=st.builds(TimeBreakdown, **dict.fromkeys(TimeBreakdown.model_fields, seconds)),
        memory=st.lists(
            st.builds(MemoryBreakdown, **dict.fromkeys(MemoryBreakdown.model_fields, counts)), max_size=2
        ).map(tuple),
        memory_budget_bytes=st.none() | counts,
    ),
    software=st.dictionaries(texts, texts, max_size=3),
)
links = st.builds(Link, name=texts, latency_s=seconds, bandwidth_bytes_per_s=rates)
clusters = st.builds(
    ClusterSpec,
    name=texts,
    num_nodes=counts,
    devices_per_node=counts,
    device=st.builds(
        DeviceSpec,
        name=texts,
        memory_bytes=counts,
        peak_flops_per_s=st.dictionaries(texts, rates, max_size=3),
        memory_bandwidth_bytes_per_s=rates,
    ),
    intra=links,
    inter=links,
    source=texts,
)
profiles = st.builds(
    Profile,
    provenance=st.sampled_from(Provenance),
    device=texts,
    num_devices=counts,
    model_fingerprint=texts,
    layers=st.lists(
        st.builds(
            LayerTiming,
            kind=texts,
            shape=st.builds(LocalShape, batch=counts, tp=counts),
            remat=st.sampled_from(Remat),
            forward=timings,
            backward=timings,
        ),
        max_size=2,
    ).map(tuple),
    collectives=st.lists(
        st.builds(
            CollectiveTiming,
            kind=st.sampled_from(CollectiveKind),
            axis_size=counts,
            level=texts,
            bytes=counts,
            timing=timings,
        ),
        max_size=2,
    ).map(tuple),
    overlap=st.floats(0, 1),
    update_bytes_per_s=st.none() | rates,
)
documents = plans | clusters | profiles


@given(documents)
def test_a_document_is_equal_after_json(document):
    assert type(document).from_json(document.to_json()) == document


@given(documents)
def test_a_document_is_equal_after_toml(document):
    data = tomllib.loads(format_toml(document.model_dump(mode="json")))
    assert validate(type(document), data, "test") == document


@given(documents, documents)
def test_equal_documents_have_equal_hashes_and_no_differences(left, right):
    again = type(left).from_json(left.to_json())
    assert left.content_hash() == again.content_hash()
    assert left.diff(again) == []
    if type(left) is type(right) and left != right:
        assert left.content_hash() != right.content_hash()
        assert left.diff(right)


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_a_saved_document_loads_from_a_folder_made_for_it(tmp_path, suffix):
    path = tmp_path / "new" / "folder" / f"plan{suffix}"
    samples.plan().save(path)
    assert Plan.load(path) == samples.plan()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR


def test_a_model_spec_is_equal_after_json(tmp_path):
    path = tmp_path / "model.json"
    samples.model_spec().save(path)
    assert ModelSpec.load(path) == samples.model_spec()


def test_toml_refuses_a_document_with_nulls_in_lists(tmp_path):
    path = tmp_path / "model.toml"
    with pytest.raises(DocumentError, match="TOML cannot hold None here; save the document as .json"):
        samples.model_spec().save(path)
    assert not path.exists()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    samples.plan().save(path)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        samples.plan(global_batch=128).save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_json_text_keeps_short_values_on_a_line():
    text = samples.plan().to_json()
    assert '"strategy": {"dp": ["a"], "tp": ["b", "c"], "sp": []' in text
    assert max(map(len, text.splitlines())) <= 120


class Note(Document):
    text: str
    sizes: dict[str, float]


def test_the_hash_is_the_same_on_every_machine():
    assert Note(text="é", sizes={"b": 2, "a": 1.5}).content_hash() == "dc135fb41e01717e"


def faulty_plan():
    data = json.loads(samples.plan().to_json())
    data.pop("model")
    data["global_batch"] = "64"
    data["schedul"] = data.pop("schedule")
    data["mesh"][1]["size"] = 2.5
    data["stages"][0]["groups"][1]["strategy"] |= {"zero": 5, "remat": "ful", "tpp": ["b"], "dp": "a"}
    return data


def test_every_fault_of_a_document_is_named_at_once():
    with pytest.raises(DocumentError) as caught:
        Plan.from_json(json.dumps(faulty_plan()), source="plan.json")
    assert str(caught.value).splitlines() == [
        "plan.json: 8 faults in this Plan:",
        "  model: missing. Name of the model, for people.",
        "  mesh[1].size: found 2.5; expected a valid integer",
        "  global_batch: found '64'; expected a valid integer",
        "  stages[0].groups[1].strategy.dp: found 'a'; expected a valid array",
        "  stages[0].groups[1].strategy.zero: found 5; expected less than or equal to 3",
        "  stages[0].groups[1].strategy.remat: found 'ful'; expected 'none', 'gathers', 'attention', 'dots' or 'full'."
        " Did you mean 'full'?",
        "  stages[0].groups[1].strategy.tpp: unknown key. Did you mean 'tp'?",
        "  schedul: unknown key. Did you mean 'schedule'?",
    ]


def test_an_unknown_key_without_a_near_name_lists_the_known_ones():
    data = json.loads(samples.plan().to_json())
    data["mesh"][0]["zzz"] = 1
    with pytest.raises(DocumentError, match=r"mesh\[0\].zzz: unknown key. Known: name, size, level\."):
        Plan.from_json(json.dumps(data))


def test_axes_that_serve_twice_are_refused_with_their_place():
    data = json.loads(samples.plan().to_json())
    data["stages"][0]["groups"][0]["strategy"]["tp"] = ["a"]
    with pytest.raises(
        DocumentError, match=r"stages\[0\].groups\[0\].strategy: one mesh axis serves two kinds of parallelism"
    ):
        Plan.from_json(json.dumps(data))


def test_a_fault_in_an_optional_part_has_its_place():
    data = json.loads(cluster_preset("h100x16").to_json())
    data["inter"]["latency"] = data["inter"].pop("latency_s")
    data["device"]["peak_flops_per_s"]["bfloat16"] = -1.0
    with pytest.raises(DocumentError) as caught:
        ClusterSpec.from_json(json.dumps(data), source="cluster.json")
    assert str(caught.value).splitlines() == [
        "cluster.json: 3 faults in this ClusterSpec:",
        "  device.peak_flops_per_s.bfloat16: found -1.0; expected greater than 0",
        "  inter.latency_s: missing. Of one message between two devices.",
        "  inter.latency: unknown key. Did you mean 'latency_s'?",
    ]


def test_several_nodes_need_a_link_between_them():
    data = cluster_preset("h100x16").model_dump(mode="json") | {"inter": None}
    with pytest.raises(DocumentError, match="the document: 2 nodes need an `inter` link between them"):
        validate(ClusterSpec, data, "cluster.toml")


@pytest.mark.parametrize(("version", "advice"), [(2, "update galvatron_jax"), (0, "versions start at 1")])
def test_an_unknown_version_is_refused(version, advice):
    with pytest.raises(
        DocumentError,
        match=rf"plan.json: this Plan has version {version}, but this galvatron_jax knows version 1; {advice}",
    ):
        Plan.from_json(json.dumps({"version": version, "new": "things"}), source="plan.json")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("plan.json", '{\n "model": ,\n}', r"plan.json: not valid JSON, line 2 column 11: Expecting value\."),
        ("plan.json", '{"model": "a", "model": "b"}', "plan.json: the key 'model' is given twice in one table"),
        ("plan.json", "[1]", "plan.json: holds a list; expected a table of named fields"),
        ("plan.toml", "model = \n", r"plan.toml: not valid TOML: Invalid value \(at line 1, column 9\)"),
        ("plan.yaml", "model: a", r"plan.yaml: unknown suffix '.yaml'; documents are .json or .toml files"),
        ("plan.json", b"\xff\xfe", "plan.json: cannot be read as text"),
    ],
)
def test_a_file_that_is_no_document_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DocumentError, match=message):
        Plan.load(path)


def test_a_missing_file_is_named_with_the_near_one(tmp_path):
    samples.plan().save(tmp_path / "plan.json")
    with pytest.raises(DocumentError, match=r"pln.json: no such file. Did you mean .*/plan.json\?"):
        Plan.load(tmp_path / "pln.json")
    with pytest.raises(DocumentError, match=r"its folder .*none does not exist either"):
        Plan.load(tmp_path / "none" / "plan.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(DocumentError, match="folder.json: is a folder"):
        Plan.load(tmp_path / "folder.json")


def test_diff_names_each_place():
    left = samples.plan()
    right = samples.plan(
        (0, 1, LayerStrategy(dp=("a", "b", "c"))), (1, 4, LayerStrategy(dp=("a", "b"), tp=("c",))), global_batch=32
    )
    assert left.diff(right) == [
        "global_batch: 64 -> 32",
        "stages[0].groups[1].strategy.dp: ['a'] -> ['a', 'b']",
        "stages[0].groups[1].strategy.tp: ['b', 'c'] -> ['c']",
    ]


def test_diff_shows_what_only_one_has():
    left = samples.plan()
    right = samples.plan((0, 4, LayerStrategy(dp=("a", "b", "c"))))
    lines = left.diff(right)
    assert lines[0] == "stages[0].groups[0].stop: 1 -> 4"
    assert lines[1].startswith("stages[0].groups[1]: {'start': 1")
    assert lines[1].endswith("… -> absent")


def test_diff_refuses_another_type():
    with pytest.raises(InputError, match="A Plan cannot be compared with a ClusterSpec"):
        samples.plan().diff(cluster_preset("h100x8"))


@pytest.mark.parametrize("document", [ClusterSpec, ModelSpec, Profile, Plan])
def test_the_schema_describes_the_document(document):
    schema = document.json_schema()
    assert schema["description"]
    assert schema["additionalProperties"] is False
    for name, definition in schema["$defs"].items():
        # A named tuple's docstring does not reach its schema.
        assert definition.get("description") or name == "Place"


def test_the_schema_of_a_plan_describes_every_field():
    for name, field in Plan.json_schema()["properties"].items():
        assert field.get("description"), name
    assert "ZeRO stage" in Plan.json_schema()["$defs"]["LayerStrategy"]["properties"]["zero"]["description"]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lr: float = 1e-3
    sizes: dict[str, tuple[int, ...]] = {}
    where: str | int = "here"


def test_validation_serves_other_models_too():
    assert validate(Options, {"lr": 1, "where": 3}, "run.toml").lr == 1.0
    with pytest.raises(DocumentError) as caught:
        validate(Options, {"Lr": 1, "sizes": {"a": [1, "2"]}, "where": []}, "run.toml")
    assert str(caught.value).splitlines() == [
        "run.toml: 3 faults in this Options:",
        "  sizes.a[1]: found '2'; expected a valid integer",
        "  where: found []; expected a valid string or a valid integer",
        "  Lr: unknown key. Did you mean 'lr'?",
    ]


@given(
    st.recursive(st.none() | st.integers() | texts, lambda x: st.lists(x) | st.dictionaries(texts, x), max_leaves=30)
)
def test_json_text_holds_any_data(data):
    assert parse_json(format_json({"data": data}), source="test") == {"data": data}
