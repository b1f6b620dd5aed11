"""The report card's calibration, of what the timing part found: python -m bench.gpu_check.calibrate FOLDER"""

import sys
from pathlib import Path

from bench.gpu_check.parts import CALIBRATION, read_rows
from bench.report_card import calibration


def calibrate(folder: Path) -> None:
    """timing.jsonl of the folder -> calibration.json, a file for the report card's --calibration."""
    rows = [row for row in read_rows(folder / "timing.jsonl") if {"op", "seconds"} <= row.keys()]
    calibration.write(folder / CALIBRATION, rows)


if __name__ == "__main__":
    calibrate(Path(sys.argv[1]))
