"""Where numbers go: the run folder, JSON lines, the terminal and the report.

`prefero.tracking.console` and `prefero.tracking.report` are imported by name: they bring rich and jinja2.
"""

from prefero.tracking.base import StageAware, Tracker, Trackers, sample_rows
from prefero.tracking.jsonl import JsonlTracker
from prefero.tracking.run_folder import RunFolder

__all__ = ["JsonlTracker", "RunFolder", "StageAware", "Tracker", "Trackers", "sample_rows"]
