"""Where the packages lie when they are installed; all else stands in pyproject.toml.

`bcm` is a library to import. `pipelines`, `cluster` and `data` are what its commands are made of, and names that a
user's own project may have: they lie in the folder `bcm_commands`, which the script `bcm` puts before everything else.
"""

from setuptools import find_packages, setup

INNER = ("cluster", "data", "pipelines")

setup(
    packages=[
        *find_packages(include=["bcm", "bcm.*"]),
        *(
            f"bcm_commands.{name}"
            for name in find_packages(include=[f"{inner}{rest}" for inner in INNER for rest in ("", ".*")])
        ),
    ],
    package_dir={f"bcm_commands.{name}": name for name in INNER},
    package_data={"": ["py.typed"]},
)
