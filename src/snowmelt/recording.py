"""What a GPU does at every step, compiled or recorded once and replayed; where that fails, as it is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from snowmelt.device import Precision, give_back_memory, is_gpu, reason_of


class Faster:
    """The forward pass of a network: made faster in training, whose batches have one size, and plain otherwise.

    Plain, too, from the moment on that this fails.
    """

    def __init__(
        self, network: nn.Module, way: Callable[[], Callable[..., Any]], failed: Callable[[str], object]
    ) -> None:
        self.network, self.plain, self.failed = network, network.forward, failed
        self.fast: Callable[..., Any] | None = None
        try:
            self.fast = way()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.fast = None
        self.failed(reason_of(error))

    def __call__(self, *given: Any, **named: Any) -> Any:
        """What `forward` says."""
        if self.fast is None or not self.network.training:
            return self.plain(*given, **named)
        try:
            return self.fast(*given, **named)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._give_up(error)
        # Not before the error, whose frames hold what was recorded, is gone.
        forget_tried(next(self.network.parameters()).device)
        return self.plain(*given, **named)


@contextmanager
def undisturbed() -> Generator[None]:
    """Within it nothing is collected: a graph that went while another is recorded would break it.

    Should that fail, what follows is asked for where it was before; torch would go on where it recorded.
    """
    gc.collect()
    collected = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()) if torch.cuda.is_available() else nullcontext():
            yield
    finally:
        if collected:
            gc.enable()


class Recorded:
    """The forward pass of a network, and its gradient, as a GPU's graphs: recorded when first asked, then replayed.

    Small networks wait for the processor, which asks for hundreds of operations at every step; a graph is asked for
    at once. Every batch must be like the first one.

    Args:
        forward: what is recorded.
    """

    def __init__(self, network: nn.Module, forward: Callable[..., Any]) -> None:
        self.network, self.forward = network, forward
        self.replay: Callable[..., Any] | None = None

    def __call__(self, *given: Tensor | None) -> Any:
        """What `forward` says; None, which stands for what was left away, is at the same places every time."""
        places = [place for place, one in enumerate(given) if one is not None]
        tensors = tuple(one for one in given if one is not None)
        if self.replay is None:
            self.replay = self._record(tensors, places)
        return self.replay(*tensors)

    def _record(self, given: tuple[Tensor, ...], places: list[int]) -> Callable[..., Any]:
        def forward(*tensors: Tensor) -> Any:
            filled: list[Tensor | None] = [None] * (places[-1] + 1)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            return self.forward(*filled)

        # torch records a module by its `forward`, and puts the replaying one in its place. It is called to warm up;
        # dropout is to draw afterwards what it would have drawn without.
        ours, self.network.forward, seed = self.network.forward, forward, torch.initial_seed()
        kind = given[0].device.type
        dtype, active = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        try:
            with undisturbed(), torch.autocast(kind, dtype, enabled=active, cache_enabled=False):
                torch.cuda.make_graphed_callables(self.network, given, allow_unused_input=True)
            return self.network.forward
        except torch.OutOfMemoryError as error:
            # What is recorded keeps its memory; without, there may be enough.
            raise RuntimeError("no memory to record it") from error
        finally:
            torch.manual_seed(seed)
            self.network.forward = ours


def speed_up(network: nn.Module, precision: Precision, failed: Callable[[str], object]) -> None:
    """Let `network` compute compiled, recorded or both while it trains, as `precision` says; its weights keep their
    names. What is recorded calls no hooks.

    Args:
        failed: is told why, where that cannot be done; the network then computes as before.
    """

    def faster() -> Callable[..., Any]:
        forward = torch.compile(network.forward, dynamic=False) if precision.compiled else network.forward
        return Recorded(network, forward) if precision.recorded else forward

    if precision.compiled or precision.recorded:
        network.forward = Faster(network, faster, failed)


def forget_tried(device: torch.device) -> None:
    """Give back the memory of what was only tried: graphs, and all that they keep, go with the next collection."""
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()
    else:
        give_back_memory()


class Replayed:
    """A function of tensors on a GPU, that is recorded after its first calls and replayed from then on.

    Its tensors must be as large every time, and what it changes must stay where it is. Where it cannot be recorded,
    and on other devices, it is called.
    """

    WARM, DEVICE = 3, "cuda"
    """Calls before it is recorded, in which it makes what it keeps; and where it is."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given, self.answer = list[Tensor](), torch.empty(0)

    def __call__(self, *given: Tensor) -> Tensor:
        """What the function answers."""
        self.calls += 1
        if self.calls == self.WARM + 1 and given[0].device.type == self.DEVICE:
            self._record(given)
        if self.graph is None:
            return self.function(*given)
        torch._foreach_copy_(self.given, given)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        self.graph.replay()
        return self.answer.clone()

    def _record(self, given: tuple[Tensor, ...]) -> None:
        graph, self.given = torch.cuda.CUDAGraph(), [one.detach().clone() for one in given]
        try:
            with undisturbed(), torch.cuda.graph(graph):
                self.answer = self.function(*self.given)
            self.graph = graph
        except RuntimeError:
            # It goes on being called.
            self.given = []
