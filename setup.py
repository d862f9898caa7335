"""The one step that pyproject.toml cannot say: a wheel carries config/ inside the services that
ship it. An editable installation reads it from the source tree."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPS_CONFIG = ("genesis_svc",)


class BuildWithConfig(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for package in SHIPS_CONFIG:
            shutil.copytree("config", Path(self.build_lib, package, "config"), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfig})
