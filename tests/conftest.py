"""Puts the repository root and the miniature's folder on the import path."""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "mini")]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes rather than seconds on one core")
