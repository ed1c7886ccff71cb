"""The whole profile: from programs to a document, cached, resumable."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import pytest

from galvatron_jax.errors import InputError
from galvatron_jax.profiler import LayerTimingRequest, Sampling, live_mesh, profile, profile_layers
from galvatron_jax.profiler.bench import Bench
from galvatron_jax.profiler.cache import TimingCache
from galvatron_jax.spec.model import ModelSpec
from galvatron_jax.spec.presets import cluster_preset
from galvatron_jax.spec.profile import LocalShape, Profile, Provenance
from galvatron_jax.spec.strategy import LayerStrategy, Remat

QUICK = Sampling(window_s=0.002, budget_s=0.005, max_samples=3)
MODEL = ModelSpec(name="fake", fingerprint="f00", microbatch=8, kinds=(), layers=(), parameters=())


@dataclass
class Chain:
    """A program of `length` dependent matrix products, backward twice as many."""

    batch: int
    length: int = 1
    width: int = 32
    num_layers: int = 1

    def __post_init__(self):
        weight = jax.ShapeDtypeStruct((self.width, self.width), jnp.float32)
        self.forward_inputs = [weight, jax.ShapeDtypeStruct((self.batch, self.width), jnp.float32)]
        self.backward_inputs = self.forward_inputs

    def forward_fn(self, weight, x):
        for _ in range(self.length):
            x = jnp.tanh(x @ weight)
        return {"out": x}

    def backward_fn(self, weight, x):
        return self.forward_fn(weight, self.forward_fn(weight, x)["out"])


@dataclass
class Builds:
    """Counts how often programs are built, and fails from a given one on."""

    fail_at: int | None = None
    built: list[int] = field(default_factory=list)

    def __call__(self, batch):
        def build():
            if self.fail_at is not None and len(self.built) == self.fail_at:
                raise KeyboardInterrupt
            self.built.append(batch)
            return Chain(batch)

        return build


def request(batch, *, kind="k1", remat=Remat.NONE):
    return LayerTimingRequest(
        kind=kind, name="Block", shape=LocalShape(batch=batch), remat=remat, strategy=LayerStrategy(), microbatch=batch
    )


def programs(builds, batches=(1, 2, 4)):
    return [(request(batch), builds(batch)) for batch in batches]


def measure(tmp_path, builds, **options):
    return profile(
        MODEL, programs(builds), message_bytes=(1024,), cache_dir=tmp_path, progress=False, sampling=QUICK, **options
    )


def test_a_profile_says_what_was_measured_where_and_with_what(tmp_path):
    builds = Builds()
    first = measure(tmp_path, builds)
    assert isinstance(first, Profile)
    assert first.provenance is Provenance.MEASURED
    assert (first.device, first.num_devices, first.model_fingerprint) == ("cpu", 8, "f00")
    assert [layer.shape.batch for layer in first.layers] == [1, 2, 4]
    assert {timing.axis_size for timing in first.collectives} == {2, 4, 8}
    assert first.update_bytes_per_s > 0
    assert {"jax", "jaxlib", "galvatron_jax", "python"} <= set(first.software)
    assert builds.built == [1, 2, 4]

    again = Builds()
    assert measure(tmp_path, again) == first
    assert again.built == []


def test_an_interrupted_run_loses_at_most_one_point(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, Builds(fail_at=2))
    resumed = Builds()
    measure(tmp_path, resumed)
    assert resumed.built == [4]


def test_longer_programs_take_longer_and_backward_is_timed_by_itself(tmp_path):
    asked = [
        (request(64, kind="short"), lambda: Chain(64, length=1, width=256)),
        (request(64, kind="long"), lambda: Chain(64, length=24, width=256)),
    ]

    def measure(number: int) -> list[float]:
        bench = Bench(mesh=live_mesh(), cache=TimingCache(tmp_path / str(number)), sampling=QUICK)
        short, long = profile_layers(asked, bench=bench)
        return [short.forward.median_s, long.forward.median_s, long.backward.median_s]

    # Other processes may run at any time: the fastest of a few profiles is the truest.
    short, forward, backward = map(min, zip(*(measure(n) for n in range(4)), strict=True))
    assert forward > 2 * short
    assert backward > 2 * short


def test_kind_shape_and_remat_are_cached_apart(tmp_path):
    bench = Bench(mesh=live_mesh(), cache=TimingCache(tmp_path), sampling=QUICK)
    builds = Builds()
    asked = [request(2), request(2, remat=Remat.FULL), request(2, kind="k2"), request(2)]
    timings = profile_layers([(each, builds(2)) for each in asked], bench=bench)
    assert [timing.remat for timing in timings] == [Remat.NONE, Remat.FULL, Remat.NONE, Remat.NONE]
    assert len(builds.built) == 3


def test_a_program_that_does_not_fit_is_left_out_with_a_warning(tmp_path, caplog):
    bench = Bench(mesh=live_mesh(), cache=TimingCache(tmp_path), sampling=QUICK)

    def too_large():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 TiB")

    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    timings = profile_layers([(request(1), too_large), (request(2), lambda: Chain(2))], bench=bench)
    assert [timing.shape.batch for timing in timings] == [2]
    assert "Block batch 1, tp 1, remat none does not fit" in caplog.text
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        profile_layers([(request(1), broken)], bench=bench)


def test_another_cluster_than_the_live_one_is_refused(tmp_path):
    cluster = cluster_preset("h100x64")
    with pytest.raises(InputError, match="'h100x64' has 64 devices but 8 are live"):
        measure(tmp_path, Builds(), cluster=cluster)


def test_progress_is_drawn_on_stderr(tmp_path, capfd):
    profile(
        MODEL,
        [],
        message_bytes=(1024,),
        cache_dir=tmp_path,
        progress=True,
        sampling=QUICK,
        mesh=live_mesh(jax.devices()[:2]),
    )
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Profiling fake" in shown.err
    assert "6/6" in shown.err
