"""Run a command as a Ray job: ship the working directory, follow the logs, return the job's exit code."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ClusterError
from cluster.runtime_env import job_runtime_env
from cluster.session import require_listener

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

POLL_SECONDS = 1.0
PATIENCE_SECONDS = 300.0
"""A job server that is silent for longer is given up."""


def submit(address: str, entrypoint: Sequence[str], *, working_dir: str | Path, env_vars: Mapping[str, str]) -> int:
    """Run a command on the cluster and wait for its end, printing what it prints.

    Args:
        address: URL of the job server, `http://host:8265`.
        entrypoint: the command and its arguments, one each, as it would be typed in `working_dir`.
        working_dir: shipped to the cluster.
        env_vars: added to the job's environment; no secrets.

    Returns:
        0 if the job succeeded; its own exit code if it failed; 1 if it was stopped or never started.

    Raises:
        ClusterError: the server does not answer, or the directory or the environment cannot be shipped.
    """
    runtime_env = job_runtime_env(working_dir, env_vars)
    client = _connect(address)
    try:
        job = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=runtime_env)
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"{address} refused the job: {error}") from error
    print(f"job {job} at {address}; to end it: ray job stop --address {address} {job}", flush=True)
    info = _follow(client, job)
    succeeded = info.status.value == "SUCCEEDED"
    # Where the command ran and failed, Ray's message repeats the log.
    reason = f"exit code {info.driver_exit_code}" if info.driver_exit_code else info.message
    print(f"job {job}: {info.status.value}" + ("" if succeeded else f", {reason}"), flush=True)
    return 0 if succeeded else max(1, info.driver_exit_code or 1)


def _connect(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise ClusterError(f"{address!r} is not the URL of a job server; it looks like http://host:8265")
    remedy = "is the cluster up, and its port forwarded (`ray dashboard ray_cluster.yaml`)?"
    require_listener(address, "job server", remedy)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ClusterError(f"{address} asks for a token: {error}") from error
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"what answers at {address} is not a Ray job server: {error}") from error


def _follow(client: JobSubmissionClient, job: str) -> JobDetails:
    """Print the logs until the job has ended. Only its status tells that: a log stream may break off before."""
    printed = 0
    while True:
        printed = asyncio.run(_print_stream(client, job, printed))
        info = _details(client, job)
        if info.status.is_terminal():
            break
        time.sleep(POLL_SECONDS)
    try:
        print(client.get_job_logs(job)[printed:], end="", flush=True)
    except (RuntimeError, OSError) as error:
        print(f"the last lines of the log are missing: {error}", file=sys.stderr)
    return info


async def _print_stream(client: JobSubmissionClient, job: str, printed: int) -> int:
    """Print the log from character `printed` on, as long as the stream lasts; returns the characters printed by now."""
    position = 0
    try:
        async for text in client.tail_job_logs(job):
            print(text[max(0, printed - position) :], end="", flush=True)
            position += len(text)
            printed = max(printed, position)
    except Exception as error:
        print(f"log stream broke off, trying again: {error}", file=sys.stderr)
    return printed


def _details(client: JobSubmissionClient, job: str) -> JobDetails:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return client.get_job_info(job)
        except (RuntimeError, OSError) as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{client.get_address()} has not answered for {PATIENCE_SECONDS:.0f} s; job {job} may still run: "
                    "look with `ray job status` when the server is back"
                ) from error
        time.sleep(POLL_SECONDS)


def main() -> int:
    """Run a command as a Ray job, follow its logs and exit with its code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.submit", description=main.__doc__)
    parser.add_argument("--address", default=os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"))
    parser.add_argument("--working-dir", default=".", help="directory shipped to the cluster (%(default)s)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="may be repeated; no secrets")
    parser.add_argument("command", nargs="+", help="-- python -m pipelines.train digits ...")
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        for text in options.env:
            if not re.match("[^=]+=", text):
                raise ClusterError(f"--env {text!r} is not NAME=VALUE")
        env_vars = dict(text.split("=", 1) for text in options.env)
        return submit(options.address, options.command, working_dir=options.working_dir, env_vars=env_vars)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("no longer following; the job goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
