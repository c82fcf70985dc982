"""What `make gpu` writes: one JSON, and what every part of it has to hold."""

from typing import Any

Record = dict[str, Any]
Row = dict[str, Any]

NUMBER = (int, float, type(None))
TEXT = (str,)
HEAD: dict[str, tuple[type, ...]] = {
    "device": TEXT, "architecture": TEXT, "driver": TEXT, "torch": TEXT, "triton": TEXT,
    "cuda": TEXT, "python": TEXT, "commit": TEXT, "date": TEXT, "mode": TEXT,
    "copy_tb_s": NUMBER, "gemm_tflops": NUMBER, "gemm_tflops_fp32": NUMBER, "seconds": NUMBER,
    "parts": (list,), "tests": (list,), "sanitizer": (list,), "loading": (list,), "rows": (list,),
}  # fmt: skip
ROW: dict[str, tuple[type, ...]] = {
    "op": TEXT, "backend": TEXT, "n": (int,), "m": (int,), "d": (int,), "dtype": TEXT,
    "pass": TEXT, "ms_median": NUMBER, "ms_min": NUMBER, "tflops": NUMBER, "share_of_gemm": NUMBER,
    "peak_mib": NUMBER, "extra_mib": NUMBER, "error": NUMBER, "reference_error": NUMBER,
    "error_rows": NUMBER, "deterministic": (bool, type(None)), "rounds": (int,), "setting": TEXT,
    "sources": (str, type(None)), "problem": TEXT,
}  # fmt: skip
PASSES = ("forward", "backward", "both")
PART: dict[str, tuple[type, ...]] = {
    "part": TEXT, "outcome": TEXT, "seconds": NUMBER, "limit": NUMBER, "detail": TEXT,
}  # fmt: skip
TEST: dict[str, tuple[type, ...]] = {
    "file": TEXT, "operator": TEXT, "backend": TEXT, "dtype": TEXT, "passed": (int,),
    "failed": (int,), "skipped": (int,), "not finished": (int,), "messages": (list,),
}  # fmt: skip
SANITIZED: dict[str, tuple[type, ...]] = {
    "tool": TEXT, "op": TEXT, "backend": TEXT, "outcome": TEXT,
}  # fmt: skip
LOADED: dict[str, tuple[type, ...]] = {
    "modality": TEXT, "outcome": TEXT, "difference": NUMBER, "bound": NUMBER,
    "samples_s": NUMBER, "samples_s_cpu": NUMBER,
}  # fmt: skip
LISTS = {"parts": PART, "tests": TEST, "sanitizer": SANITIZED, "loading": LOADED, "rows": ROW}


def _check(where: str, given: Any, keys: dict[str, tuple[type, ...]]) -> None:
    if not isinstance(given, dict):
        raise ValueError(f"{where} is {type(given).__name__}, not an object: run make gpu again")
    for key, kinds in keys.items():
        if key not in given:
            raise ValueError(f"{where} has no {key!r}: run make gpu again")
        value = given[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{where}: {key!r} is {value!r}, not {wanted}: run make gpu again")


def check_row(where: str, row: Any) -> None:
    _check(where, row, ROW)
    if row["pass"] not in PASSES:
        raise ValueError(f"{where}: 'pass' is {row['pass']!r}, not one of {', '.join(PASSES)}")
    measured = row["ms_median"] is not None and row["ms_min"] is not None
    if measured == bool(row["problem"]):
        raise ValueError(
            f"{where}: a row has either times or a 'problem', not {row['ms_median']!r} and "
            f"{row['problem']!r}: what did not run has no figure"
        )


def check(record: Any) -> Record:
    """The record itself; ValueError names what it lacks, or what has another form."""
    _check("the record", record, HEAD)
    for name, keys in LISTS.items():
        for number, entry in enumerate(record[name]):
            where = f"{name}[{number}]"
            if name == "rows":
                check_row(where, entry)
            else:
                _check(where, entry, keys)
    return record
