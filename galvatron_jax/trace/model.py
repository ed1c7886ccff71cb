"""`trace`: from a Flax model and its loss to a `ModelSpec`, with the live programs that the runtime runs."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from galvatron_jax.errors import InputError
from galvatron_jax.spec.model import InputPort, Layer, LayerKind, ModelSpec, OutputPort, Parameter, PortRole, Variable
from galvatron_jax.spec.program import FactorRole, Program
from galvatron_jax.trace import kinds as kinds_
from galvatron_jax.trace import roles, slicing
from galvatron_jax.trace.factors import FactorAnalysis
from galvatron_jax.trace.flat import Aval
from galvatron_jax.trace.functional import Functional, functional, named_leaves
from galvatron_jax.trace.summands import mark_summands


@dataclass(frozen=True)
class Traced:
    """A traced model: the document that plans are made from, and what is needed to run one."""

    spec: ModelSpec
    functional: Functional
    programs: tuple[kinds_.JointProgram, ...]
    """Per kind of `spec.kinds`, its live program: same values and operations, by number."""
    constants: Mapping[str, Any] = field(repr=False)
    """Arrays behind `const:ID`."""
    avals: Mapping[str, Aval] = field(repr=False)
    """Shapes of `value:ID`, `batch:PATH`, `state:PATH`."""
    batch_tree: Any
    """Structure of the batch."""
    batch_names: tuple[str, ...]


def trace(
    model: Any,
    loss_fn: Callable[[Any, Any], Any],
    example_batch: Any,
    *,
    microbatch: int | None = None,
    make: Callable[[Any], Any] | None = None,
    name: str | None = None,
) -> Traced:
    """Cuts a model into layers and finds which dims can be sharded, with no annotations.

    Args:
        model: `flax.nnx.Module` (concrete or abstract) or `flax.linen.Module`.
        loss_fn: `loss_fn(model, batch) -> loss` or `(loss, aux)`.
        example_batch: pytree of arrays or `jax.ShapeDtypeStruct`s; dim 0 of every leaf is the batch.
        microbatch: examples to trace at; the example's own number by default.
        make: constructs the NNX model from a seed, for initialisation inside a program.
        name: what to call the model.

    Raises:
        InputError: when the loss is no scalar, or the batch's leaves disagree about the number of examples.
    """
    shapes = microbatch_shapes(example_batch, microbatch)
    size = next(iter(jax.tree.leaves(shapes))).shape[0]
    model_fn = functional(model, loss_fn, shapes, make=make)
    batch_leaves = named_leaves(shapes)
    closed, sinks = _trace_loss(model_fn, shapes, marked=True)
    sources = [f"param:{p}" for p in model_fn.parameters] + [f"state:{p}" for p in model_fn.state]
    sources += [f"batch:{p}" for p in batch_leaves]
    forward, outputs = slicing.read_forward(closed, sources, unroll=True)
    results = _results(forward, outputs, sinks)
    segments, finals = slicing.cut(forward, [v for _, v in results])
    results = [(sink, value) for (sink, _), value in zip(results, finals, strict=True)]
    builder = _Builder(model_fn, forward, segments, dict(results), size)
    spec, programs, constants = builder.build(name or model_fn.name, batch_leaves)
    avals = {f"value:{v}": aval for v, aval in enumerate(forward.avals)}
    avals |= {f"state:{p}": Aval(tuple(s.shape), s.dtype) for p, s in model_fn.state.items()}
    avals |= {f"batch:{p}": Aval(tuple(s.shape), s.dtype) for p, s in batch_leaves.items()}
    avals |= {source: forward.avals[v] for v, source in forward.sources.items()}
    return Traced(spec, model_fn, programs, constants, avals, jax.tree.structure(shapes), tuple(batch_leaves))


def microbatch_shapes(example_batch: Any, microbatch: int | None) -> Any:
    """Shapes of one micro-batch, from an example batch of any size."""
    leaves = named_leaves(example_batch)
    if not leaves:
        raise InputError("the example batch has no arrays; give a pytree with the batch as dim 0 of every leaf.")
    scalars = [name for name, leaf in leaves.items() if not jnp.shape(leaf)]
    if scalars:
        raise InputError(f"batch leaves {scalars} are scalars; dim 0 of every leaf must be the batch.")
    sizes = {name: jnp.shape(leaf)[0] for name, leaf in leaves.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"batch leaves disagree about the number of examples (dim 0): {sizes}.")
    size = microbatch or next(iter(sizes.values()))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *jnp.shape(leaf)[1:]), _canonical(leaf)), example_batch
    )


def _canonical(leaf: Any) -> Any:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return dtype if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else jax.dtypes.canonicalize_dtype(dtype)


def _trace_loss(model_fn: Functional, shapes: Any, *, marked: bool) -> tuple[Any, list[str]]:
    """The loss as a jaxpr of flat inputs, and the names of its outputs."""
    sinks: list[str] = []

    def loss(parameters: Sequence[Any], state: Sequence[Any], batch: Any) -> list[Any]:
        output = model_fn.apply(
            dict(zip(model_fn.parameters, parameters, strict=True)),
            dict(zip(model_fn.state, state, strict=True)),
            batch,
        )
        sinks[:] = ["loss"] + ["weight"] * (output.weight is not None)
        sinks.extend(f"aux:{name}" for name in output.aux)
        sinks.extend(f"state:{name}" for name in output.state)
        weight = [] if output.weight is None else [jnp.asarray(output.weight)]
        return [output.loss, *weight, *map(jnp.asarray, output.aux.values()), *output.state.values()]

    arguments = (list(model_fn.parameters.values()), list(model_fn.state.values()), shapes)
    with model_fn.marks(model_fn.classes if marked else frozenset()):
        closed = jax.make_jaxpr(lambda *a: loss(*a))(*arguments)
        if marked and model_fn.classes and not slicing.has_marks(closed.jaxpr):
            # An inner jax.jit that was traced before answers from JAX's cache, without marks.
            jax.clear_caches()
            closed = jax.make_jaxpr(lambda *a: loss(*a))(*arguments)
    return closed, sinks


def _results(forward: slicing.ForwardProgram, outputs: list[int], sinks: Sequence[str]) -> list[tuple[str, int]]:
    """Sinks with their values; stacked state slice by slice."""
    results: list[tuple[str, int]] = []
    for sink, parts in zip(sinks, slicing.resolve_stacks(forward, outputs), strict=True):
        if len(parts) == 1 or not sink.startswith("state:"):
            results.append((sink, outputs[sinks.index(sink)]))
        else:
            results += [(f"{sink}[{i}]", part) for i, part in enumerate(parts)]
    return results


class _Builder:
    """Builds the `ModelSpec` from segments."""

    def __init__(
        self,
        model_fn: Functional,
        forward: slicing.ForwardProgram,
        segments: list[slicing.Segment],
        results: dict[str, int],
        microbatch: int,
    ) -> None:
        self.model_fn, self.forward, self.segments, self.results = model_fn, forward, segments, results
        self.microbatch = microbatch
        self.flow = kinds_.gradient_flow(forward, segments, results["loss"])
        self.constants: dict[str, Any] = {}
        self.labels: dict[int, roles.DimLabels] = {
            v: roles.DimLabels(0) for v, source in forward.sources.items() if source.startswith("batch:")
        }

    def build(
        self, name: str, batch_leaves: Mapping[str, Any]
    ) -> tuple[ModelSpec, tuple[kinds_.JointProgram, ...], dict[str, Any]]:
        members, shapes = self._group()
        hoisted = [self._hoisted(indices, shapes) for indices in members]
        kind_of = {index: kind for kind, indices in enumerate(members) for index in indices}
        joints = [
            kinds_.joint_program(
                self.segments[indices[0]], self.forward, self.flow, [shapes[indices[0]].constants[p] for p in positions]
            )
            for indices, positions in zip(members, hoisted, strict=True)
        ]
        programs = [_analysed(joint) for joint in joints]
        kinds = self._kinds(members, programs, joints, hoisted)
        layers = tuple(
            self._layer(index, kind_of[index], [shapes[index].constants[p] for p in hoisted[kind_of[index]]])
            for index in range(len(self.segments))
        )
        parameters = tuple(
            Parameter(path=p, shape=tuple(s.shape), dtype=str(s.dtype)) for p, s in self.model_fn.parameters.items()
        )
        state = tuple(
            Variable(path=p, shape=tuple(s.shape), dtype=str(s.dtype)) for p, s in self.model_fn.state.items()
        )
        kinds = mark_summands(kinds, layers)
        notes = tuple(f"{kind.name}: {note}" for kind in kinds for note in kind.notes) + self._notes()
        fingerprint = kinds_.digest(
            *(kind.fingerprint for kind in kinds),
            *(f"{layer.kind} {layer.inputs} {layer.outputs}" for layer in layers),
            *(f"{p.path} {p.shape} {p.dtype}" for p in parameters),
        )
        spec = ModelSpec.model_construct(
            version=1,
            name=name,
            fingerprint=fingerprint,
            microbatch=self.microbatch,
            kinds=kinds,
            layers=layers,
            parameters=parameters,
            state=state,
            results=tuple((sink, self._reference(value)) for sink, value in self.results.items()),
            notes=notes,
        )
        return spec, tuple(joints), self.constants

    def _notes(self) -> tuple[str, ...]:
        if len(self.segments) > 1:
            return ()
        return ("no repeated block was found: the whole model is planned as one layer.",)

    def _group(self) -> tuple[list[list[int]], list[kinds_.Shape]]:
        shapes = [kinds_.shape_of(s, self.forward, self.flow) for s in self.segments]
        groups: dict[str, list[int]] = defaultdict(list)
        for index, shape in enumerate(shapes):
            groups[shape.text].append(index)
        return list(groups.values()), shapes

    def _hoisted(self, indices: list[int], shapes: list[kinds_.Shape]) -> list[int]:
        """Positions of constants that differ between the layers of a kind: they become inputs."""
        first = shapes[indices[0]].constants
        constants = self.forward.constants
        return [
            position
            for position in range(len(first))
            if not all(
                kinds_.same_constant(constants[first[position]], constants[shapes[i].constants[position]])
                for i in indices[1:]
            )
        ]

    def _reference(self, value: int) -> str:
        if value in self.forward.constants:
            self.constants[f"const:{value}"] = self.forward.constants[value]
            return f"const:{value}"
        return self.forward.sources.get(value, f"value:{value}")

    def _layer(self, index: int, kind: int, hoisted: Sequence[int]) -> Layer:
        segment = self.segments[index]
        inputs = tuple(self._reference(v) for v in (*segment.inputs, *hoisted))
        prefix = _common_path([r[6:] for r in inputs if r.startswith("param:")])
        if not segment.block or not prefix:
            prefix = segment.name if not segment.block else f"{segment.name}[{index}]"
        return Layer(kind=kind, name=prefix, inputs=inputs, outputs=tuple(f"value:{v}" for v in segment.outputs))

    # ------------------------------------------------------------------------------------------------ kinds

    def _kinds(
        self,
        members: list[list[int]],
        programs: list[Program],
        joints: list[kinds_.JointProgram],
        hoisted: list[list[int]],
    ) -> tuple[LayerKind, ...]:
        """Roles need the labels of what comes in, so kinds are done in layer order; blocks then teach the rest."""
        done: dict[int, tuple[Program, int | None]] = {}
        for _ in range(2):
            for kind in sorted(range(len(members)), key=lambda k: members[k][0]):
                segment = self.segments[members[kind][0]]
                ports_in, ports_out = self._ports(segment, joints[kind], len(hoisted[kind]))
                done[kind] = roles.assign_roles(programs[kind], ports_in, ports_out, self.microbatch)
                self._learn(segment, done[kind][0], ports_in, ports_out, [self.segments[i] for i in members[kind]])
        return tuple(
            self._kind(members[k], done[k][0], done[k][1], joints[k], len(hoisted[k])) for k in range(len(members))
        )

    def _ports(
        self, segment: slicing.Segment, joint: kinds_.JointProgram, num_hoisted: int
    ) -> tuple[list[roles.Port], list[roles.Port]]:
        unlabelled = roles.DimLabels()
        values = joint.flat.inputs[: joint.num_inputs]
        inputs = [
            roles.Port(self._role(v), n, self.labels.get(v, unlabelled), i in joint.differentiated, self._annotation(v))
            for i, (v, n) in enumerate(zip(segment.inputs, values[: len(segment.inputs)], strict=True))
        ]
        inputs += [roles.Port(PortRole.CONSTANT, n, unlabelled, False) for n in values[len(values) - num_hoisted :]]
        outputs = [
            roles.Port(self._out_role(v), n, self.labels.get(v, unlabelled), i in joint.cotangents)
            for i, (v, n) in enumerate(zip(segment.outputs, joint.flat.outputs[: joint.num_outputs], strict=True))
        ]
        return inputs, outputs

    def _learn(
        self,
        segment: slicing.Segment,
        program: Program,
        inputs: list[roles.Port],
        outputs: list[roles.Port],
        members: list[slicing.Segment],
    ) -> None:
        """Labels the values that the kind's layers read and write."""
        for ports, side in ((inputs, "inputs"), (outputs, "outputs")):
            for position, port in enumerate(ports[: len(getattr(segment, side))]):
                if port.role in (PortRole.PARAMETER, PortRole.STATE, PortRole.CONSTANT):
                    continue
                labels = roles.labels_of(program, port.value)
                for member in members:
                    value = getattr(member, side)[position]
                    known = self.labels.get(value, roles.DimLabels())
                    sequence = labels.sequence if segment.block else frozenset()
                    batch = known.batch if side == "inputs" else labels.batch
                    self.labels[value] = roles.DimLabels(batch, known.sequence | sequence)

    def _annotation(self, value: int) -> tuple[Any, ...]:
        path = self.forward.sources.get(value, "").removeprefix("param:").split("[")[0]
        return self.model_fn.annotations.get(path, ())

    def _role(self, value: int) -> PortRole:
        source = self.forward.sources.get(value, "value:").split(":")[0]
        return {"param": PortRole.PARAMETER, "state": PortRole.STATE, "batch": PortRole.BATCH}.get(
            source, PortRole.ACTIVATION
        )

    def _out_role(self, value: int) -> PortRole:
        for sink, held in self.results.items():
            if held == value:
                name = sink.split(":")[0]
                if name in ("loss", "weight", "aux"):
                    return PortRole(name)
        return PortRole.ACTIVATION

    def _kind(
        self,
        indices: list[int],
        program: Program,
        growing: int | None,
        joint: kinds_.JointProgram,
        num_hoisted: int,
    ) -> LayerKind:
        segment = self.segments[indices[0]]
        ports_in, ports_out = self._ports(segment, joint, num_hoisted)
        gradients = dict(zip(joint.differentiated, program.outputs[joint.num_outputs :], strict=True))
        seeds = dict(zip(joint.cotangents, program.inputs[joint.num_inputs :], strict=True))
        names = self._port_names(segment, num_hoisted)
        inputs = tuple(
            InputPort.model_construct(role=p.role, name=names[i], value=p.value, gradient=gradients.get(i))
            for i, p in enumerate(ports_in)
        )
        outputs = tuple(
            OutputPort.model_construct(role=p.role, name=f"out{i}", value=p.value, cotangent=seeds.get(i))
            for i, p in enumerate(ports_out)
        )
        return LayerKind.model_construct(
            name=segment.name,
            fingerprint=program_fingerprint(program),
            program=program,
            inputs=inputs,
            outputs=outputs,
            batch_factor=growing,
            notes=roles.unsharded_notes(program),
        )

    def _port_names(self, segment: slicing.Segment, num_hoisted: int) -> list[str]:
        references = [self.forward.sources.get(v, "") for v in segment.inputs]
        prefix = _common_path([r[6:] for r in references if r.startswith("param:")]) if segment.block else ""
        names = []
        for position, reference in enumerate(references):
            path = reference.split(":", 1)[-1]
            inside = path[len(prefix) :].lstrip("/") if prefix and path.startswith(prefix) else path
            names.append(inside or path or f"in{position}")
        return names + [f"const{i}" for i in range(num_hoisted)]


def _analysed(joint: kinds_.JointProgram) -> Program:
    """Factor analysis of a joint program; gradients are made of the factors of what they are gradients of."""
    analysis = FactorAnalysis(joint.flat)
    for port, gradient in zip(joint.differentiated, joint.flat.outputs[joint.num_outputs :], strict=True):
        analysis.tie(joint.flat.inputs[port], gradient)
    for port, seed in zip(joint.cotangents, joint.flat.inputs[joint.num_inputs :], strict=True):
        analysis.tie(joint.flat.outputs[port], seed)
    return analysis.to_program()


def program_fingerprint(program: Program) -> str:
    """Hash of a program's structure, sizes and dtypes; the micro-batch does not enter.

    Only values that operations or ports touch count, and factors are numbered in order of use.
    """
    used = dict.fromkeys([*program.inputs, *program.outputs])
    for op in program.operations:
        used |= dict.fromkeys((*op.operands, *op.results))
    number: dict[int, int] = {}
    sizes: list[int | str] = []
    values = []
    for value in used:
        for factor in (f for dim in program.values[value].dims for f in dim):
            if factor not in number:
                number[factor] = len(number)
                known = program.factors[factor]
                sizes.append("batch" if known.role is FactorRole.BATCH else known.size)
        dims = [[number[f] for f in dim] for dim in program.values[value].dims]
        values.append([dims, program.values[value].dtype])
    rename = {value: index for index, value in enumerate(used)}
    operations = [
        [op.primitive, [rename[v] for v in op.operands], [rename[v] for v in op.results]] for op in program.operations
    ]
    ports = [[rename[v] for v in program.inputs], [rename[v] for v in program.outputs]]
    return kinds_.digest(*map(json.dumps, (sizes, values, operations, ports)))


def _common_path(paths: Sequence[str]) -> str:
    """The longest common prefix of whole path parts, such as `blocks/3`; of stacked ones with their slice."""
    if not paths:
        return ""
    index = {p[p.rindex("[") :] for p in paths if p.endswith("]")}
    split = [p.split("[")[0].split("/") for p in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) != 1:
            break
        common.append(parts[0])
    if len(paths) == 1:
        common = split[0][:-1]
    return "/".join(common) + (index.pop() if len(index) == 1 and common else "")
