"""The benchmarks' official prompt files, which lie beside a checkout and are never committed."""

from __future__ import annotations

import pytest
from small import ROOT

BENCHMARKS = ROOT.parent / "shared" / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks' files are not beside the checkout")
