"""Many independent calls as Ray tasks: one runner for everything that goes through a data set shard by shard."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar

from cluster import session

T = TypeVar("T")
R = TypeVar("R")

_FEWEST = 5
"""With fewer tasks than this, Ray would take longer to start than they take."""
_QUEUED_PER_CPU = 2


def in_parallel(
    call: Callable[[T], Iterator[R]], tasks: Sequence[T], *, here: bool, user_error: type[Exception]
) -> Iterator[R]:
    """What `call` yields for each task, in the order in which the tasks end.

    Few tasks run in this process, others on Ray, one CPU each; a lost worker's task is started again.

    Args:
        call: A function of a module, with all its other arguments bound.
        tasks: Its arguments, one by one.
        here: Whether the tasks read or write files of this machine, so that no other node can do them.
        user_error: What a task may raise; it is raised here as it was there, and the others are then given up.
    """
    if len(tasks) < _FEWEST:
        yield from chain.from_iterable(map(call, tasks))
        return
    with session.connect(worker_logs=False):
        yield from _on_ray(call, tasks, here, user_error)


def _on_ray(
    call: Callable[[T], Iterator[R]], tasks: Sequence[T], here: bool, user_error: type[Exception]
) -> Iterator[R]:
    import ray
    from ray.exceptions import RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = ray.get_runtime_context().get_node_id()
    cpus = sum(int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if not here or n["NodeID"] == this_node)
    if cpus < 1:
        # The head of a cluster may lend no CPU to tasks.
        yield from chain.from_iterable(map(call, tasks))
        return
    strategy = NodeAffinitySchedulingStrategy(this_node, soft=False) if here else "DEFAULT"
    remote = ray.remote(_all_of).options(num_cpus=1, scheduling_strategy=strategy)
    shared = ray.put(call)
    waiting = iter(tasks)
    running = [remote.remote(shared, task) for task in islice(waiting, _QUEUED_PER_CPU * cpus)]
    try:
        while running:
            done, running = ray.wait(running)
            running += [remote.remote(shared, task) for task in islice(waiting, len(done))]
            yield from ray.get(done[0])
    except RayTaskError as error:
        if isinstance(error.cause, user_error):
            raise error.cause from None
        raise
    finally:
        for task in running:
            ray.cancel(task)


def _all_of(call: Callable[[T], Iterator[R]], task: T) -> list[R]:
    return list(call(task))
