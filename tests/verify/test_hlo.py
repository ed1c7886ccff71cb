# ruff: noqa: E501 (lines of compiled programs)
"""Compiled programs read from their text."""

from __future__ import annotations

import pytest

from galvatron_jax.verify.hlo import Shape, read_module

from .snippets import module

TEXT = module(
    """
  %p = f32[4,8]{1,0} parameter(0), metadata={op_name="state[\\'params\\'](x)"}
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}, /*index=2*/bf16[2]{0:T(256)}) tuple(%zero, %p)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%more, body=%turn, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %x = f32[4,8]{1,0} get-tuple-element(%loop), index=1
""",
    """
%turn (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %t = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %same = (s32[], f32[4,8]{1,0}) copy(%t)
}
""",
)


def test_instructions_stand_in_order_with_shapes_and_operands() -> None:
    main = read_module(TEXT).main
    assert [i.opcode for i in main.instructions] == ["parameter", "constant", "tuple", "while", "get-tuple-element"]
    assert main.by_name["start"].shapes == (Shape("s32", ()), Shape("f32", (4, 8)), Shape("bf16", (2,)))
    assert main.by_name["start"].operands == ("zero", "p")
    assert main.root.name == "x"
    assert [i.name for i in main.readers["loop"]] == ["x"]


def test_a_loop_knows_its_body_and_its_trips() -> None:
    found = read_module(TEXT)
    loop = found.main.by_name["loop"]
    assert loop.called == ("turn",)
    assert loop.trips == 3
    assert found.computations["turn"].root.operands == ("t",)


def test_a_module_says_whether_it_is_scheduled() -> None:
    assert read_module(TEXT).scheduled
    assert not read_module(TEXT.replace("is_scheduled=true", "other=1")).scheduled


def test_parameters_stand_in_order_of_their_numbers() -> None:
    text = module("  %b = f32[2]{0} parameter(1)\n  %a = f32[3]{0} parameter(0)\n  ROOT %c = f32[2]{0} negate(%b)\n")
    assert [p.name for p in read_module(text).main.parameters] == ["a", "b"]


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (Shape("f32", (4, 8)), 128),
        (Shape("bf16", ()), 2),
        (Shape("pred", (3,)), 3),
        (Shape("s4", (8,)), 4),
        (Shape("f8e4m3fn", (8,)), 8),
        (Shape("token", ()), 0),
        (Shape("u64", (0, 8)), 0),
    ],
    ids=str,
)
def test_bytes_of_shapes(shape: Shape, count: int) -> None:
    assert shape.bytes == count


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no HLO module"):
        read_module("module @jit_f {}")
