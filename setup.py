"""What pyproject.toml cannot say: a wheel carries the repository's data/ as attnlab/data."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads data/ where it lies
            shutil.copytree("data", Path(self.build_lib, "attnlab", "data"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithData})
