"""What a training run is doing, from the first worker to the terminal of whoever started it."""

import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from bcm.training import TrainConfig
from data.loader import Batch

if TYPE_CHECKING:
    from ray.util.queue import Queue

LINE_SECONDS = 1.0
"""How often a terminal's progress line is drawn."""
LOG_SECONDS = 15.0
"""How often a line is written where the output is no terminal."""


def progress_line(
    k: int, config: TrainConfig, N: int, losses: Mapping[str, float], images_per_second: float, wait_share: float
) -> str:
    """One look at a running training, for people.

    Args:
        k: iterations done.
        config: says how many there will be, of how many images.
        N: grid points; 0 for an objective without grid.
        losses: the mean of each of the objective's terms.
        images_per_second: over all workers.
        wait_share: share of the time spent waiting for data, in [0, 1].
    """
    left = int((config.iterations - k) * config.batch_size / max(images_per_second, 1e-9))
    grid = f"N {N}  " if N else ""
    terms = "".join(f"{name} {loss:.3f}  " for name, loss in losses.items())
    return (
        f"step {k}/{config.iterations}  {grid}{terms}{images_per_second:.0f} images/s  "
        f"data wait {100 * wait_share:.1f} %  left {left // 60}:{left % 60:02d}"
    )


class Meter:
    """Speed and waiting share of the batches that pass by, over the last few points."""

    def __init__(self, batch_size: int, points: int = 10) -> None:
        """Average over `points` calls of `measure`; a batch is of `batch_size` images over all workers."""
        self._batch_size = batch_size
        self._seen: deque[tuple[float, int, float]] = deque([(time.perf_counter(), 0, 0.0)], maxlen=points + 1)
        self._images = 0
        self._waited = 0.0

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, counted as they pass."""
        for batch in batches:
            self._images += self._batch_size
            self._waited += batch.wait
            yield batch

    def measure(self) -> tuple[float, float]:
        """Images per second and share of time waiting."""
        self._seen.append((time.perf_counter(), self._images, self._waited))
        (start, images, waited), (end, *_) = self._seen[0], self._seen[-1]
        seconds = max(end - start, 1e-9)
        return (self._images - images) / seconds, (self._waited - waited) / seconds


def line_queue() -> "Queue":
    """Ray's own queue, for lines from the first worker to the driver; safe to send to workers.

    Ray Train's callbacks would hear of progress through `ray.train.report` alone, which is a barrier for all workers
    and answered when the controller next looks at them: half a second of two workers' time, where a line takes a
    millisecond. And they run in a process whose output a private Ray hides.
    The queue is on the node of the driver, which outlives the workers' nodes; it takes no CPU from them.
    """
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


@contextmanager
def shown(lines: "Queue") -> Iterator[None]:
    """Print the newest of the queued lines during the block: one live line on a terminal, a line at times elsewhere."""
    from ray.exceptions import RayError

    over = threading.Event()
    live = sys.stdout.isatty()

    def draw() -> None:
        while not over.wait(LINE_SECONDS if live else LOG_SECONDS):
            with suppress(RayError):
                if waiting := lines.get_nowait_batch(lines.qsize()):
                    print(("\r\x1b[K" if live else "") + waiting[-1], end="" if live else "\n", flush=True)

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
