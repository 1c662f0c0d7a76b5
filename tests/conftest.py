"""Makes the flat files importable, and keeps the slow checks out of the default run: `python -m pytest -m slow`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
