"""Times calls against each other: in turns, so that noise of the machine hits all alike, and in another order every
round, so that none always finds what the one before it left in the caches."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

SAMPLE_SECONDS = 2e-3  # of the CPU, at least, by repeating short calls
GRAPH_WARMUPS = 3

Call = Callable[[], object]


@dataclass
class Samples:
    """Seconds of one call, over and over."""

    seconds: list[float] = field(default_factory=list)
    host_seconds: float | None = None  # on a GPU: what the call costs Python and the launcher
    how: str = "wall"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, by the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


@dataclass(frozen=True)
class Remote:
    """A call in another process, which times it: `time(repeats)` gives seconds for one."""

    time: Callable[[int], float]

    def __call__(self) -> None:
        self.time(1)


def timer(call: Call, device: torch.device) -> Callable[[int], float]:
    """What `Remote.time` does in its process."""
    if device.type == "cuda":
        replay, _ = _captured(call)
        return lambda repeats: _event_time(replay)
    return lambda repeats: _time(call, repeats)


def measure(
    calls: Mapping[str, Call], device: torch.device, budget: float, least_rounds: int = 3
) -> dict[str, Samples]:
    """Runs all calls in turns until `budget` seconds per call are spent, at least `least_rounds` times each."""
    if device.type == "cuda":
        return _measure_cuda(calls, budget, least_rounds)
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(SAMPLE_SECONDS / max(_time(call, 1), 1e-9)))
    samples = {name: Samples() for name in calls}
    for name in _turns(list(calls), budget, least_rounds):
        samples[name].seconds.append(_time(calls[name], repeats[name]))
    return samples


def _turns(names: list[str], budget: float, least_rounds: int) -> Iterator[str]:
    order, shuffler = list(names), random.Random(0)
    deadline = time.perf_counter() + budget * len(names)
    rounds = 0
    while rounds < least_rounds or time.perf_counter() < deadline:
        shuffler.shuffle(order)
        yield from order
        rounds += 1


def _time(call: Call, repeats: int) -> float:
    if isinstance(call, Remote):
        return call.time(repeats)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _measure_cuda(calls: Mapping[str, Call], budget: float, least_rounds: int) -> dict[str, Samples]:
    """Kernels by events around replays of a CUDA graph, the host by the clock while the GPU runs behind."""
    samples, replays = {}, {}
    for name, call in calls.items():
        if isinstance(call, Remote):
            samples[name], replays[name] = Samples(how="in its process"), call
            continue
        replay, how = _captured(call)
        samples[name], replays[name] = Samples(host_seconds=_host_time(call), how=how), replay
    for name in _turns(list(calls), budget, least_rounds):
        replay = replays[name]
        samples[name].seconds.append(replay.time(1) if isinstance(replay, Remote) else _event_time(replay))
    return samples


def _captured(call: Call) -> tuple[Call, str]:
    """The call as a CUDA graph, or as it is where it cannot be captured (it waits for the GPU in between)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARMUPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, "events"
    return graph.replay, "CUDA graph"


def _event_time(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _host_time(call: Call, repeats: int = 20) -> float:
    torch.cuda.synchronize()
    seconds = _time(call, repeats)
    torch.cuda.synchronize()
    return seconds
