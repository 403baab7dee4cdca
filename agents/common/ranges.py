"""Ranges of arguments: what lies outside is refused in one sentence that names the argument."""


def require_at_least(least: float, **arguments: float) -> None:
    """:raises ValueError: naming the first argument that is smaller"""
    for name, value in arguments.items():
        if not value >= least:
            raise ValueError(f"{name} must be {least} or more, not {value}.")


def require_above_zero(**arguments: float) -> None:
    """:raises ValueError: naming the first argument that is not"""
    for name, value in arguments.items():
        if not value > 0.0:
            raise ValueError(f"{name} must be above 0, not {value}.")


def require_shares(**arguments: float) -> None:
    """:raises ValueError: naming the first argument outside [0, 1]"""
    for name, value in arguments.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], not {value}.")
