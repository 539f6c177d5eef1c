"""Calibration on a fleet's own history."""

from bench.report import Options, Row


def run(options: Options) -> list[Row]:
    raise NotImplementedError
