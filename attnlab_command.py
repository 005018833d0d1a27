"""The `attnlab` command: runs attnlab/cli.py without importing attnlab.

`import attnlab` imports PyTorch, which takes seconds and is just what may be broken: `attnlab
--help` answers at once, and `attnlab doctor` also where PyTorch is missing.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def load_alone(name: str, path: Path) -> ModuleType:
    """Import the file at `path` as the module `name`, without the package that it lies in."""
    spec = spec_from_file_location(name, path)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    package = Path(find_spec("attnlab").origin).parent
    return load_alone("attnlab_cli", package / "cli.py").main()


if __name__ == "__main__":
    sys.exit(main())
