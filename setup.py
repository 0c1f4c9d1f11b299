"""What pyproject.toml cannot say: next to the packages that are found, configs/ is installed as fastcorl/configs."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["fastcorl*"]), *find_packages("kernels"), "fastcorl.configs"])
