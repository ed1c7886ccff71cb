import json
import math
from pathlib import Path

import pytest

from galvatron_jax.errors import DocumentError, InputError
from galvatron_jax.spec import Plan, Profile
from galvatron_jax.spec.galvatron import read_computation, read_hardware, read_memory
from galvatron_jax.spec.galvatron.reading import MB
from galvatron_jax.spec.plan import Schedule
from galvatron_jax.spec.profile import CollectiveKind, LocalShape, Provenance
from galvatron_jax.spec.strategy import Remat

DATA = Path(__file__).parent.parent / "data" / "galvatron"
CONFIG = DATA / "plans" / "galvatron_config_toy_1nodes_8gpus_per_node_16GB_bf16.json"
NOTATION = DATA / "plans" / "toy_8gpu_16GB_batch32.json"
HARDWARE = DATA / "hardware"


@pytest.fixture
def write(tmp_path):
    """Writes a JSON file and returns its path."""

    def write(data, name="file.json"):
        path = tmp_path / name
        path.write_text(json.dumps(data))
        return path

    return write


def config(**changes):
    data = json.loads(CONFIG.read_text()) | {"world_size": 8} | changes
    return {key: value for key, value in data.items() if value is not None}


def notation(**changes):
    return json.loads(NOTATION.read_text()) | changes


def fault(read, *args, **kwargs):
    with pytest.raises(DocumentError) as error:
        read(*args, **kwargs)
    return str(error.value)


def toy_profile(**choices):
    choices = {"num_nodes": 1, "devices_per_node": 8} | choices
    return Profile.from_galvatron(DATA / "toy", hardware=HARDWARE, **choices)


class TestComputation:
    def test_derived_times_become_seconds_of_whole_batches(self):
        profile = read_computation(DATA / "toy" / "computation_profiling_bf16_toy_all.json")
        assert profile.sequence == (512,)
        assert dict(profile.layers[0].points) == pytest.approx({1: 1.5e-3, 2: 2.5e-3, 4: 4.5e-3, 8: 8.5e-3})
        assert dict(profile.other.points)[2] == pytest.approx(5e-3)

    def test_raw_times_alone_give_what_the_profiler_derives(self, write):
        path = DATA / "toy" / "computation_profiling_bf16_toy_all.json"
        raw = {key: ms for key, ms in json.loads(path.read_text()).items() if key.startswith("layernum")}
        derived, whole = read_computation(write(raw)), read_computation(path)
        for left, right in zip((*derived.layers, derived.other), (*whole.layers, whole.other), strict=True):
            assert left.seconds_per_example == pytest.approx(dict(right.seconds_per_example))

    def test_version_2_0_names_neither_batch_nor_sequence(self, write):
        profile = read_computation(write({"layernum[6]_bsz2": 64.0, "layernum[12]_bsz2": 120.0, "layertype_0": 4.6}))
        assert profile.sequence is None
        assert profile.layers[0].seconds_per_example[None] == pytest.approx(4.6e-3)
        assert profile.other.seconds_per_example == pytest.approx({2: (64 / 2 - 6 * 56 / 12) * 1e-3})

    def test_several_layer_types_have_a_sequence_each(self, write):
        raw = {"layernum[2,2]": 20.0, "layernum[4,2]": 24.0, "layernum[2,4]": 32.0}
        profile = read_computation(write({f"{key}_bsz2_seq[512,128]": ms for key, ms in raw.items()}))
        assert profile.sequence == (512, 128)
        assert [layer.seconds_per_example[2] for layer in profile.layers] == pytest.approx([1e-3, 3e-3])
        assert profile.other.seconds_per_example[2] == pytest.approx(2e-3)

    def test_other_may_be_numbered_and_never_negative(self, write):
        times = {"layernum[1]_bsz1_seq128": 1.0, "layernum[2]_bsz1_seq128": 3.0}
        assert read_computation(write(times)).other.seconds_per_example == {1: 0.0}
        times["layertype_other_0_bsz1_seq128"] = 5.0
        assert read_computation(write(times)).other.seconds_per_example == {1: 5e-3}

    def test_one_of_several_sequence_lengths_is_asked_for(self, write):
        path = write({"layertype_0_bsz1_seq128": 1.0, "layertype_0_bsz1_seq256": 2.0})
        assert read_computation(path, sequence=256).layers[0].points == ((1, 2e-3),)
        assert "sequence lengths 128; 256. Choose one: give `sequence`" in fault(read_computation, path)
        text = fault(read_computation, path, sequence=512)
        assert "no times at sequence length 512; it has 128; 256" in text

    def test_every_wrong_key_and_value_is_named(self, write):
        path = write({"layertyp_0_bsz1_seq8": 1.0, "layertype_0_bsz1_seq8": "4", "layertype_0_bsz0_seq8": -1})
        text = fault(read_computation, path)
        assert text.startswith(f"{path}: 4 faults in this computation profile:")
        assert "'layertyp_0_bsz1_seq8': unknown key. Did you mean the form 'layertype_K_bszB_seqS'?" in text
        assert "found '4'; expected a number that is not negative, in milliseconds" in text
        assert "found -1; expected" in text
        assert "names a batch of 0 examples" in text

    def test_a_single_model_tells_nothing_of_a_layer(self, write):
        text = fault(read_computation, write({"layernum[2]_bsz1_seq2048": 24.5}))
        assert "no layer's time can be told from layernum[2] alone: profile a second model with more layers" in text

    def test_missing_layer_types_and_times_are_faults(self, write):
        assert "the file has no times" in fault(read_computation, write({}))
        text = fault(read_computation, write({"layertype_1_bsz1_seq8": 1.0}))
        assert "layer types are numbered from 0, but 0 of 0 to 1 has no time" in text
        times = {"layertype_0_bsz1_seq8": 1.0, "layertype_1_bsz1_seq4": 1.0, "layertype_other_bsz1_seq[8,8]": 1.0}
        text = fault(read_computation, write(times))
        assert "layertype_1_bszB_seqS: has no time at sequence length 8,8" in text

    def test_times_that_fall_with_layers_are_refused(self, write):
        text = fault(read_computation, write({"layernum[2]_bsz1_seq8": 9.0, "layernum[4]_bsz1_seq8": 8.0}))
        assert "layertype_0: models with more layers took less time: profile the model again" in text


class TestMemory:
    def test_megabytes_become_bytes(self):
        memory = read_memory(DATA / "toy" / "memory_profiling_bf16_toy_all.json")
        assert memory.sequence_parallel
        assert memory.layers[0].parameter_bytes == 64 * MB
        assert memory.layers[0].activation_bytes == {1: 40 * MB, 2: 20 * MB, 4: 10 * MB, 8: 5 * MB}
        assert memory.layers[0].checkpoint_bytes == 8 * MB
        assert memory.whole.state_bytes[2] == 200 * MB
        assert memory.first.activation_bytes[4] == 4 * MB
        assert memory.last.state_bytes[1] == 240 * MB

    def test_raw_runs_say_how_they_were_run(self):
        raw = read_memory(DATA / "toy" / "memory_profiling_bf16_toy_all.json").raw
        assert len(raw) == 24
        run = next(r for r in raw if r.checkpoint and r.layers == (2,) and r.rank == 7 and r.quantity == "act_peak")
        assert (run.pp, run.tp, run.dp, run.vocabulary_parallel, run.sequence_parallel) == (1, 2, 4, True, True)
        assert (run.batch, run.sequence, run.bytes) == (8, (512,), 120 * MB)

    def test_version_2_0_has_no_level_of_sequences_and_one_number_for_the_ends(self, write):
        ends = {
            f"other_memory_pp_{name}": {"model_states": 4, "activation": 2} for name in ("off", "on_first", "on_last")
        }
        layer = {"parameter_size": 1, "tp_activation_per_bsz_dict": {"1": 3}}
        run = {"layernum[1]_bsz8_rank0_ms": 9.0}
        memory = read_memory(write({"1_1_8": run, "layertype_0": layer} | ends))
        assert (memory.sequence, memory.sequence_parallel) == (None, False)
        assert memory.layers[0].checkpoint_bytes is None
        assert memory.whole.state_bytes == {1: 4 * MB}
        assert memory.raw[0].sequence is None

    def test_every_fault_is_named(self, write):
        data = json.loads((DATA / "toy" / "memory_profiling_bf16_toy_all.json").read_text())
        data["layertypes_0"] = {}
        assert "'layertypes_0': unknown key. Did you mean the form 'layertype_K'?" in (
            text := fault(read_memory, write(data))
        )
        del data["layertypes_0"]
        data["1_1_8_sp"]["layernum[1]_bsz8_seq512_rank0_mb"] = 1.0
        data["2_1_4_sp"] = 3
        layer = data["layertype_0_sp"]["512"]
        layer["tp_activation_per_bsz_dict"] = {"1": None, "two": 3.0}
        layer["parameter_sise"] = layer.pop("parameter_size")
        data["other_memory_pp_off_sp"]["512"]["activation"] = {"1": math.inf}
        data["other_memory_pp_on_last_sp"] = {"256": data["other_memory_pp_on_last_sp"]["512"]}
        text = fault(read_memory, write(data))
        for expected in (
            "layernum[1]_bsz8_seq512_rank0_mb': unknown key",
            "2_1_4_sp: found 3; expected a table",
            "layertype_0_sp.512.tp_activation_per_bsz_dict.1: found None; expected a number",
            "layertype_0_sp.512.tp_activation_per_bsz_dict.two: expected a tensor-parallel degree",
            "layertype_0_sp.512.parameter_size: missing",
            "'parameter_sise': unknown key. Did you mean the form 'parameter_size'?",
            "other_memory_pp_off_sp.512.activation.1: found inf",
            "other_memory_pp_on_last_sp: has no entry for sequence length 512; it has 256",
        ):
            assert expected in text

    def test_raw_runs_alone_are_not_enough(self, write):
        text = fault(read_memory, write({"1_1_8_sp": {"layernum[1]_bsz8_seq512_rank0_ms": 1.0}}))
        assert "other_memory_pp_off: missing; the derived keys it has: none (the profiler stopped" in text
        assert "layertype_K: missing" in text

    def test_keys_without_sequence_parallelism_may_be_asked_for(self):
        path = DATA / "toy" / "memory_profiling_bf16_toy_all.json"
        text = fault(read_memory, path, sequence_parallel=False)
        assert "layertype_K: missing; the derived keys it has: layertype_0_sp, other_memory_pp_off_sp" in text

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"layertype_0_sp": {"512": 3}}, "layertype_0_sp.512: found 3; expected a table"),
            ({"layertype_2_sp": {}}, "layer types are [0, 2]; expected 0, 1, and so on without gaps"),
            ({"other_memory_pp_off_sp": 7}, "other_memory_pp_off_sp: found 7; expected a table"),
            ({"layertype_0_sp": 7}, "layertype_0_sp: found 7; expected a table"),
            (
                {"layertype_0_sp": {"512": {"parameter_size": 1, "tp_activation_per_bsz_dict": 2}}},
                "tp_activation_per_bsz_dict: found 2; expected a table by tensor-parallel degree",
            ),
        ],
    )
    def test_tables_of_another_shape_are_faults(self, write, change, expected):
        data = json.loads((DATA / "toy" / "memory_profiling_bf16_toy_all.json").read_text())
        assert expected in fault(read_memory, write(data | change))


class TestHardware:
    def test_bandwidths_and_times_are_in_base_units(self):
        hardware = read_hardware(HARDWARE, num_nodes=1)
        assert hardware.num_devices == 8
        assert hardware.allreduce_bytes_per_s[2, False] == 100e9
        assert hardware.p2p_bytes_per_s == {2: 100e9, 4: 50e9}
        assert hardware.allreduce_seconds[4][2 * MB] == pytest.approx(0.1e-3)
        assert hardware.alltoall_seconds[8][1 * MB] == pytest.approx(0.05e-3)
        assert hardware.overlap_slowdown == 1.25

    def test_only_the_bandwidths_must_be_there(self, write):
        path = write({"allreduce_size_2_consec_1": 10.0}, "allreduce_bandwidth_1nodes_2gpus_per_node.json")
        hardware = read_hardware(path.parent)
        assert (hardware.p2p_bytes_per_s, hardware.allreduce_seconds, hardware.overlap_slowdown) == ({}, {}, None)

    def test_one_of_several_machines_is_asked_for(self, tmp_path):
        text = fault(read_hardware, HARDWARE)
        assert "several machines (nodes x devices: 1 x 8, 2 x 4). Choose one: give `num_nodes`" in text
        assert "no bandwidths of 4 nodes x any devices; it has nodes x devices 1 x 8, 2 x 4" in fault(
            read_hardware, HARDWARE, num_nodes=4
        )
        assert "holds no allreduce_bandwidth_{n}nodes" in fault(read_hardware, tmp_path)
        assert "Did you mean 'hardware'?" in fault(read_hardware, DATA / "hardwar")

    def test_every_wrong_entry_is_named(self, write):
        data = {"allreduce_size_2_consec_2": 1.0, "allreduce_size_2_consec_1": 0, "allreduce_size_4_consec_1": "x"}
        text = fault(read_hardware, write(data, "allreduce_bandwidth_1nodes_2gpus_per_node.json").parent)
        assert "3 faults in this hardware profile" in text
        assert "'allreduce_size_2_consec_2': unknown key. Did you mean the form 'allreduce_size_K_consec_" in text
        assert "'allreduce_size_2_consec_1': found 0; expected more, in GB/s" in text
        assert "found 'x'; expected a number that is not negative, in GB/s" in text

    def test_an_overlap_below_one_is_refused(self, write):
        write({"allreduce_size_2_consec_1": 10.0}, "allreduce_bandwidth_1nodes_2gpus_per_node.json")
        path = write({"overlap_coe": 0.5, "overlap": 1}, "overlap_coefficient.json")
        text = fault(read_hardware, path.parent)
        assert "overlap_coe: found 0.5; expected a number of at least 1" in text
        assert "'overlap': unknown key. Did you mean the form 'overlap_coe'?" in text


class TestProfile:
    def test_layers_are_imported_forward_with_the_assumed_backward(self):
        profile = toy_profile(model_fingerprint="f00d", kinds={"layertype_0": "abc"}, device="A100")
        assert (profile.provenance, profile.model_fingerprint) == (Provenance.IMPORTED, "f00d")
        assert (profile.device, profile.num_devices) == ("A100", 8)
        timings = {(t.kind, t.shape, t.remat): t for t in profile.layers}
        plain, full = (timings["abc", LocalShape(batch=2), remat] for remat in (Remat.NONE, Remat.FULL))
        assert (plain.forward.median_s, plain.backward.median_s) == pytest.approx((2.5e-3, 5e-3))
        assert (full.forward.median_s, full.backward.median_s) == pytest.approx((2.5e-3, 7.5e-3))
        assert timings["head", LocalShape(batch=2), Remat.NONE].forward.median_s == pytest.approx(2.5e-3)
        assert {t.kind for t in profile.layers} == {"abc", "embedding", "head"}

    def test_collectives_come_from_tables_where_there_are_some(self):
        profile = toy_profile()
        times = {(c.kind, c.axis_size, c.bytes): c.timing.median_s for c in profile.collectives}
        assert times[CollectiveKind.ALL_REDUCE, 4, 2 * MB] == pytest.approx(0.1e-3)
        assert times[CollectiveKind.ALL_GATHER, 4, 2 * MB] == pytest.approx(0.05e-3)
        assert times[CollectiveKind.REDUCE_SCATTER, 4, 2 * MB] == pytest.approx(0.05e-3)
        assert times[CollectiveKind.ALL_TO_ALL, 8, MB] == pytest.approx(0.05e-3)
        assert times[CollectiveKind.PERMUTE, 4, MB] == pytest.approx(MB / 50e9)
        assert profile.overlap == pytest.approx(0.75)

    def test_between_nodes_bandwidths_become_lines(self):
        profile = toy_profile(num_nodes=2, devices_per_node=4)
        times = {(c.kind, c.axis_size, c.level, c.bytes): c.timing.median_s for c in profile.collectives}
        reduce = CollectiveKind.ALL_REDUCE
        assert times[reduce, 8, "inter", MB] == pytest.approx(2 * 7 / 8 * MB / 10e9)
        assert times[reduce, 4, "intra", MB] == pytest.approx(2 * 3 / 4 * MB / 150e9)
        assert times[reduce, 4, "inter", MB] == pytest.approx(2 * 3 / 4 * MB / 20e9)
        assert times[CollectiveKind.PERMUTE, 2, "inter", MB] == pytest.approx(MB / 10e9)

    def test_it_is_a_document_like_any_other(self, tmp_path):
        profile = toy_profile()
        profile.save(tmp_path / "profile.json")
        assert Profile.load(tmp_path / "profile.json") == profile

    def test_an_unknown_kind_is_refused(self):
        with pytest.raises(InputError, match="'layertype_O' is none. Did you mean 'layertype_0'?"):
            toy_profile(kinds={"layertype_O": "abc"})

    def test_the_file_must_be_clear(self, write, tmp_path):
        assert "no such folder of Hetu-Galvatron profiles. Did you mean 'toy'?" in fault(
            Profile.from_galvatron, DATA / "tos", hardware=HARDWARE
        )
        assert "Its folder" in fault(Profile.from_galvatron, tmp_path / "a" / "b", hardware=HARDWARE)
        assert "it has no JSON files" in fault(Profile.from_galvatron, tmp_path, hardware=HARDWARE)
        times = {"layertype_0": 4.0}
        for name in ("bf16_a", "bf16_a_seqlen2048", "fp32_a"):
            write(times, f"computation_profiling_{name}.json")
        text = fault(Profile.from_galvatron, tmp_path, hardware=HARDWARE)
        assert (
            "several files of computation times: computation_profiling_bf16_a.json, computation_profiling_fp32_a.json"
            in text
        )
        (tmp_path / "computation_profiling_fp32_a.json").unlink()
        profile = Profile.from_galvatron(tmp_path, hardware=HARDWARE, num_nodes=1)
        assert profile.layers[0].forward.median_s == pytest.approx(4e-3)


class TestPlan:
    def test_both_forms_of_a_plan_are_read_alike(self):
        plan, other = Plan.from_galvatron(CONFIG, model="toy"), Plan.from_galvatron(NOTATION, model="toy")
        assert plan == other
        assert [(axis.name, axis.size, axis.level) for axis in plan.mesh] == [(n, 2, "intra") for n in "abc"]
        assert plan.pipeline_axes == ("a",)
        assert (plan.global_batch, plan.num_microbatches) == (32, 4)
        assert plan.schedule is Schedule.ONE_F_ONE_B_STASH
        assert plan.batch_axes == ()
        assert [[(g.start, g.stop, g.strategy.short()) for g in stage.groups] for stage in plan.stages] == [
            [(0, 1, "dp[b]·tp[c]·sp·zero3"), (1, 2, "dp[b,c]·zero2·remat:full")],
            [
                (2, 3, "dp[b]·tp[c]·sp·zero3"),
                (3, 4, "tp[b,c]·sp"),
                (4, 5, "ulysses[b,c]"),
                (5, 6, "dp[b]·tp[c]·sp·zero3"),
            ],
        ]

    def test_names_default_to_the_file(self):
        plan = Plan.from_galvatron(NOTATION, model_fingerprint="f00d")
        assert (plan.model, plan.model_fingerprint) == ("toy_8gpu_16GB_batch32", "f00d")

    def test_version_2_0_has_fewer_keys(self, write):
        data = config(use_sp=None, checkpoint=None, vtp=None, vsp=None, embed_sdp=None, default_dp_type=None)
        plan = Plan.from_galvatron(write(data), sequence_parallel=False)
        assert [s.short() for s in plan.strategies] == [
            "dp[b,c]", "dp[b,c]", "dp[b]·tp[c]·zero3", "tp[b,c]", "tp[b,c]", "dp[b,c]",
        ]  # fmt: skip

    def test_one_stage_needs_no_schedule_or_division(self, write):
        data = notation(pp=1, plan=[["1-2-4-sp|zero2", 3], ["1-8-1", 1]], vtp=1)
        del data["pp_division"]
        plan = Plan.from_galvatron(write(data))
        assert plan.schedule is Schedule.NONE
        assert [s.short() for s in plan.strategies[1:5:3]] == ["dp[a,b]·ulysses[c]·zero2", "tp[a,b,c]"]

    def test_nodes_are_the_outermost_axes(self, write):
        plan = Plan.from_galvatron(write(config()), devices_per_node=4)
        assert [axis.level for axis in plan.mesh] == ["inter", "intra", "intra"]
        plan = Plan.from_galvatron(write(config()), devices_per_node=2)
        assert [axis.level for axis in plan.mesh] == ["inter", "inter", "intra"]

    def test_degrees_may_be_any_product_of_primes(self, write):
        data = notation(world=24, pp=3, pp_division=[1, 1, 2], plan=[["3-2*-4|zero2", 4]], vtp=4, bsz=48)
        plan = Plan.from_galvatron(write(data))
        assert [axis.size for axis in plan.mesh] == [3, 2, 2, 2]
        assert plan.strategies[1].short() == "dp[b,c]·tp[d]·sp·zero2"
        plan = Plan.from_galvatron(write(data), devices_per_node=8)
        assert [axis.level for axis in plan.mesh] == ["inter", "intra", "intra", "intra"]

    def test_gpipe_is_read(self, write):
        assert Plan.from_galvatron(write(config(pipeline_type="gpipe"))).schedule is Schedule.GPIPE

    def test_batches_may_be_overruled(self, write):
        path = write(config(chunks=5))
        text = fault(Plan.from_galvatron, path)
        assert "chunks: 32 examples do not divide into 5 micro-batches (Hetu-Galvatron rounds down)" in text
        assert Plan.from_galvatron(path, num_microbatches=8).num_microbatches == 8
        assert Plan.from_galvatron(path, global_batch=40).global_batch == 40
        text = fault(Plan.from_galvatron, path, global_batch=10)
        assert "tp_sizes_enc[0]: micro-batches of 2 examples do not divide over dp 4" in text

    def test_the_number_of_devices_comes_from_the_file_its_name_or_the_caller(self, write):
        data = config(world_size=None)
        assert "neither the file nor its name says how many devices there are" in fault(
            Plan.from_galvatron, write(data)
        )
        assert Plan.from_galvatron(write(data), num_devices=8).num_devices == 8
        path = write(data, "galvatron_config_toy_2nodes_4gpus_per_node_16GB.json")
        assert [axis.level for axis in Plan.from_galvatron(path).mesh] == ["inter", "intra", "intra"]

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"tp_size_enc": "1"}, "tp_size_enc: unknown key. Did you mean 'tp_sizes_enc'?"),
            ({"pp_deg": None}, "pp_deg: missing; expected a whole number"),
            ({"pp_deg": 3}, "pp_deg: 3 stages do not divide 8 devices"),
            ({"pp_deg": "2"}, "pp_deg: found '2'; expected a whole number of at least 1"),
            ({"tp_sizes_enc": None}, "tp_sizes_enc: missing; expected one number per layer"),
            ({"tp_sizes_enc": [1, 2]}, "tp_sizes_enc: found [1, 2]; expected numbers joined by commas"),
            ({"tp_sizes_enc": "1,8,4,4"}, "tp_sizes_enc[1]: 8 does not divide the 4 devices of a stage"),
            ({"checkpoint": "1,0"}, "checkpoint: has 2 entries, but tp_sizes_enc has 4; give one per layer"),
            ({"use_sp": "0,0,2,0"}, "use_sp[2]: found 2; expected 0 or 1"),
            ({"tp_consecutive_flags": "1,0,1,1"}, "tp_consecutive_flags[1]: 0 puts tensor parallelism on devices"),
            ({"cp_sizes_enc": "1,1,2,1"}, "cp_sizes_enc[2]: context parallelism of 2 is not supported"),
            ({"vcp": 2}, "vcp: context parallelism is not supported"),
            ({"vtp": 3}, "vtp: 3 does not divide the 4 devices of a stage"),
            ({"vsp": 2}, "vsp: found 2; expected 0 or 1"),
            ({"default_dp_type": "zero_2"}, "default_dp_type: found 'zero_2'. Did you mean 'zero2'?"),
            ({"pipeline_type": "1f1b"}, "pipeline_type: found '1f1b'. Known: pipedream_flush, gpipe"),
            ({"pp_division": "1,1,2"}, "pp_division: has 3 stages, but pp_deg is 2"),
            ({"pp_division": "1,2"}, "pp_division: sums to 3 layers, but 4 have a strategy"),
            ({"pp_division": "1;3"}, "pp_division: found '1;3'; expected the layers of each stage"),
            ({"pp_division": None}, "pp_division: found None; expected the layers of each stage"),
            ({"global_bsz": None}, "global_bsz: missing; expected a whole number"),
            ({"chunks": 0}, "chunks: found 0; expected a whole number of at least 1"),
        ],
    )
    def test_a_wrong_configuration_says_what_and_where(self, write, change, expected):
        assert expected in fault(Plan.from_galvatron, write(config(**change)))

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"plan": []}, "plan: found []; expected pairs such as"),
            ({"plan": ["2-1-4"]}, "plan[0]: found '2-1-4'; expected a pair such as"),
            ({"plan": [["2-1-4", 0]]}, "plan[0][1]: found 0; expected a whole number of at least 1"),
            ({"plan": [["2_1_4", 4]]}, "plan[0][0]: found '2_1_4'; expected pp-tp-dp such as"),
            ({"plan": [["2-1-4|zero1", 4]]}, "found 'zero1' after '|' in '2-1-4|zero1'; expected ddp, zero2 or zero3"),
            ({"plan": [["2-1-4f|ddp", 4]]}, "'2-1-4f|ddp' says ZeRO-3 by its f, but ddp after '|'"),
            ({"plan": [["4-1-2", 4]]}, "'4-1-2' has 4 stages, but the file has 2"),
            ({"plan": [["2-1-2", 4]]}, "'2-1-2' uses 4 devices, but there are 8"),
            ({"throughputs": 1}, "throughputs: unknown key. Did you mean 'throughput'?"),
        ],
    )
    def test_a_wrong_notation_says_what_and_where(self, write, change, expected):
        assert expected in fault(Plan.from_galvatron, write(notation(**change)))

    def test_all_faults_come_at_once(self, write):
        text = fault(Plan.from_galvatron, write(config(vtp=3, vsp=2, pipeline_type="x", pp_division="1,2")))
        assert "4 faults in this Hetu-Galvatron plan:" in text

    def test_layouts_that_the_mesh_cannot_express_are_faults(self, write):
        text = fault(Plan.from_galvatron, write(config()), devices_per_node=3)
        assert "8 devices do not fill nodes of 3: give `devices_per_node`" in text
        data = notation(world=12, pp=1, plan=[["1-3*-4|ddp", 4]], vtp=1, pp_division=[4], bsz=48)
        text = fault(Plan.from_galvatron, write(data))
        assert "plan[0][0]: dp 4 x tp 3 does not fit the stage's axes a=3 x b=2 x c=2" in text
        data = notation(world=24, pp=3, pp_division=[1, 1, 2], plan=[["3-2*-4|zero2", 4]], vtp=4, bsz=48)
        text = fault(Plan.from_galvatron, write(data), devices_per_node=12)
        assert "pp_deg: 3 stages on 2 nodes of 12: stages would lie partly within and partly between nodes" in text
