"""Where a job runs: Ray clusters, how much of them a job takes, and what is shipped with it."""
