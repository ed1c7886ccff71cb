"""1F1B as PipeDream-Flush runs it: stages that wait for one another's values only, not for a common tick.

Source: Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training" (2021). Stage `i` of `pp` begins with
`pp - 1 - i` forwards, then does a forward and a backward in turns, then the backwards that are left; so it holds
`pp - i` micro-batches at once. Whatever is sent arrives at once: its time is part of the stages' own.
"""

from __future__ import annotations

from collections.abc import Sequence


def order(stage: int, *, num_stages: int, num_microbatches: int) -> list[tuple[bool, int]]:
    """What one stage does in turn: whether it is a backward, and of which micro-batch."""
    ahead = min(num_microbatches, num_stages - 1 - stage)
    found = [(False, microbatch) for microbatch in range(ahead)]
    for microbatch in range(ahead, num_microbatches):
        found += [(False, microbatch), (True, microbatch - ahead)]
    return found + [(True, microbatch) for microbatch in range(num_microbatches - ahead, num_microbatches)]


def step_seconds(
    forward_s: Sequence[float], backward_s: Sequence[float], once_s: Sequence[float], *, num_microbatches: int
) -> float:
    """Seconds of a step: each piece of work begins as soon as its stage is free and what it reads is there.

    Args:
        forward_s: Seconds of a micro-batch's forward, per stage.
        backward_s: Of its backward.
        once_s: What follows a stage's last backward; other stages go on beside it.
        num_microbatches: Of the step.
    """
    stages = len(forward_s)
    orders = [order(stage, num_stages=stages, num_microbatches=num_microbatches) for stage in range(stages)]
    done: dict[tuple[bool, int, int], float] = {}
    place, free_s = [0] * stages, [0.0] * stages
    while any(place[stage] < len(orders[stage]) for stage in range(stages)):
        before = sum(place)
        for stage in range(stages):
            while place[stage] < len(orders[stage]):
                backward, microbatch = orders[stage][place[stage]]
                source = stage + 1 if backward else stage - 1
                ready_s = done.get((backward, source, microbatch), 0.0 if source in (-1, stages) else None)
                if ready_s is None:
                    break
                free_s[stage] = max(free_s[stage], ready_s) + (backward_s if backward else forward_s)[stage]
                done[backward, stage, microbatch] = free_s[stage]
                place[stage] += 1
        assert sum(place) > before, "the orders of the stages wait for one another"
    return max(free + once for free, once in zip(free_s, once_s, strict=True))
