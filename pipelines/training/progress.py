"""What a training run is doing, from the first worker to the terminal of whoever started it."""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

LINE_SECONDS = 1.0
"""How often a terminal's progress line is drawn."""
LOG_SECONDS = 15.0
"""How often a line is written where the output is no terminal."""


@dataclass(frozen=True)
class Progress:
    """One look at a running training."""

    step: int
    iterations: int
    N: int
    """Grid points; 0 for an objective without grid."""
    losses: dict[str, float]
    """The mean of each of the objective's terms."""
    images_per_second: float
    wait_share: float
    """Share of the time spent waiting for data, in [0, 1]."""

    def line(self, batch_size: int) -> str:
        """For people."""
        left = (self.iterations - self.step) * batch_size / max(self.images_per_second, 1e-9)
        grid = f"N {self.N}  " if self.N else ""
        losses = "".join(f"{name} {loss:.3f}  " for name, loss in self.losses.items())
        return (
            f"step {self.step}/{self.iterations}  {grid}{losses}"
            f"{self.images_per_second:.0f} images/s  data wait {100 * self.wait_share:.1f} %  "
            f"left {int(left) // 60}:{int(left) % 60:02d}"
        )


class Meter:
    """Speed and waiting share over the last few logged points."""

    def __init__(self, points: int = 10) -> None:
        """Average over `points` calls of `measure`."""
        self._seen: deque[tuple[float, int, float]] = deque([(time.perf_counter(), 0, 0.0)], maxlen=points + 1)
        self._images = 0
        self._waited = 0.0

    def add(self, images: int, waited: float) -> None:
        """Count images trained on, over all workers, and seconds this worker waited for them."""
        self._images += images
        self._waited += waited

    def measure(self) -> tuple[float, float]:
        """Images per second and share of time waiting."""
        self._seen.append((time.perf_counter(), self._images, self._waited))
        (start, images, waited), (end, *_) = self._seen[0], self._seen[-1]
        seconds = max(end - start, 1e-9)
        return (self._images - images) / seconds, (self._waited - waited) / seconds


@dataclass
class Posted:
    """What stands on the board."""

    progress: Progress | None = None
    warning: str | None = None
    """What the user should know when it is over."""


class _Board:
    def __init__(self) -> None:
        self._posted = Posted()

    def post(self, progress: Progress | None = None, warning: str | None = None) -> None:
        self._posted.progress = progress or self._posted.progress
        self._posted.warning = warning or self._posted.warning

    def read(self) -> Posted:
        return self._posted


class Board:
    """A small actor that the first worker posts to and the driver reads; safe to send to workers.

    Ray Train's callbacks would hear of progress through `ray.train.report` alone, which is a barrier for all workers
    and answered when the controller next looks at them, and they run in a process whose output a private Ray hides.
    """

    def __init__(self) -> None:
        """Start the actor on the node of the driver, which outlives the workers' nodes; it takes no CPU from them."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote: Any = ray.remote
        self._actor: Any = remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()

    def post(self, progress: Progress) -> None:
        """Post and go on at once."""
        self._actor.post.remote(progress)

    def warn(self, message: str) -> None:
        """Note what the user should know when the run is over."""
        import ray

        ray.get(self._actor.post.remote(warning=message))

    def read(self) -> Posted:
        """What stands on the board; nothing, if it cannot be reached."""
        import ray
        from ray.exceptions import RayError

        try:
            return ray.get(self._actor.read.remote(), timeout=30)
        except RayError:
            return Posted()


@contextmanager
def shown(board: Board, batch_size: int) -> Iterator[None]:
    """Print the board's progress during the block: one live line on a terminal, a line at times elsewhere."""
    over = threading.Event()
    live = sys.stdout.isatty()

    def draw() -> None:
        last = None
        while not over.wait(LINE_SECONDS if live else LOG_SECONDS):
            progress = board.read().progress
            if progress is not None and progress != last:
                last = progress
                print(("\r\x1b[K" if live else "") + progress.line(batch_size), end="" if live else "\n", flush=True)

    def until_unread() -> None:
        with suppress(BrokenPipeError):  # nobody reads on; whoever prints next in the main thread ends the program
            draw()

    thread = threading.Thread(target=until_unread, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2)
        if live:
            print()
