"""Finding the packages. The folder cli/ is installed inside merging, so that no package is called "cli" elsewhere."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["merging", "merging.*"], exclude=["merging.cli"]),  # there stands the checkout's link
        "merging.cli",
        *(f"merging.cli.{name}" for name in find_packages("cli")),
    ],
    package_dir={"merging.cli": "cli"},
)
