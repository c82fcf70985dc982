"""Times and errors of operators on the device, for `make gpu`: a line a row, as soon as it is
known. M3BIND_BENCH_DEVICE names the device.

python benchmarks/gpu_rows.py OP... --plan full --rows FILE --seconds 30 [--large | --warm]

--warm runs each of our kernels once, so that the compiler's and the tuner's work is on the disk;
--large is the one case of the plan that nobody can hold.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from gpu_contestants import (
    FLOOR,
    OURS,
    backend_of,
    call_of,
    contestant,
    is_ours,
    names_of,
    own_names,
)
from jobs import JOBS, PLANS, Job, Plan
from record import PASSES, check_row
from turns import (
    DEVICE,
    Contestant,
    NotRun,
    Taken,
    give_memory_back,
    in_turns,
    timed,
)

from m3bind import backends

WARM_ROWS = 2112  # enough pairs for the tuner to measure
UNCOMPARED = ("open_clip compiled",)  # another size would be compiled anew


def flat(found: Any) -> list[torch.Tensor]:
    return list(found) if isinstance(found, tuple) else [found]


def computed(call: Callable[..., Any], inputs: Any, kind: torch.dtype | None = None) -> Any:
    """Outputs; gradients of the features. `kind` is what floating-point inputs are cast to."""
    leaves, others = (
        [t if kind is None or not t.is_floating_point() else t.to(kind) for t in group]
        for group in inputs
    )
    leaves = [t.detach().requires_grad_() for t in leaves]
    outputs = flat(call(*leaves, *others))
    grads = torch.autograd.grad(outputs[0], leaves) if leaves else ()
    return [t.detach() for t in outputs], list(grads[:2])


def difference(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The worst ratio of norms."""
    pairs = zip(got, want, strict=True)
    return max(float((g.double() - w.double()).norm() / w.double().norm()) for g, w in pairs)


def errors_of(job: Job, op: str, d: int, dtype: str, name: str, plan: Plan) -> dict:
    """By pass: the error, that of PyTorch's formula with fp32 logits; and determinism.

    The worst ratio of norms of all seeds; forward of the value, else of the features' gradients.
    """
    n = plan.error_rows
    one: dict[str, Any] = {"error": {}, "reference_error": {}, "rows": n}
    call, formula = call_of(job, op, name, dtype), partial(job.call, backend="reference")
    for seed in range(plan.seeds):
        inputs = job.inputs(n, n, d, dtype, seed)
        want = computed(formula, inputs, torch.float64)
        plain, got = computed(formula, inputs), computed(call, inputs)
        # Of the searches only the scores and ranks: indices of equal scores are their order.
        parts = {"forward": 0, **({"backward": 1, "both": 1} if want[1] else {})}
        for pass_, at in parts.items():
            last = 1 if at == 0 else None
            for key, mine in (("error", got), ("reference_error", plain)):
                value = difference(mine[at][:last], want[at][:last])
                one[key][pass_] = max(one[key].get(pass_, 0.0), value)
        if is_ours(name) and seed == 0:
            one["deterministic"] = repeats(call, inputs)
    return one


def repeats(call: Callable[..., Any], inputs: Any) -> bool:
    """Whether two runs agree bit for bit in torch's deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = ([*chain(*computed(call, inputs))] for _ in range(2))
    except RuntimeError as error:  # torch names what it has no deterministic form of
        print(f"deterministic mode: {error}", flush=True)
        return False
    finally:
        torch.use_deterministic_algorithms(before)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Worker:
    def __init__(self, op: str, plan: Plan, rows: Path, rates: dict, seconds: float) -> None:
        self.op, self.job, self.plan, self.rows, self.rates = op, JOBS[op], plan, rows, rates
        self.start, self.seconds = time.perf_counter(), seconds
        self.speed: dict[tuple[str, str], float] = {}  # FLOP/s by contestant and dtype
        self.absent: set[str] = set()  # told once
        self.known_errors: dict[tuple[str, int, str], dict] = {}

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.start)

    def flop(self, n: int, m: int, d: int) -> float:
        return 2.0 * n * m * d

    def write(self, name: str, n: int, m: int, d: int, dtype: str, taken: Taken, errors: dict):
        sources = None
        if is_ours(name):
            primitive = backends.BUILT_ON[self.op]
            sources = backends.installed_sources(primitive, backend_of(name))
        known = [p for p in PASSES if p in self.job.units]
        for at, pass_ in enumerate(known):
            if name == FLOOR and pass_ != "both" and "both" in known:
                continue
            # Only a whole call of who does not tell its parts apart.
            times = taken.seconds if pass_ == known[-1] else [laps[at] for laps in taken.laps]
            row: dict[str, Any] = {
                "op": self.op, "backend": name, "n": n, "m": m, "d": d, "dtype": dtype,
                "pass": pass_, "setting": taken.setting, "rounds": len(times),
                "problem": taken.problem, "sources": sources,
                "ms_median": None, "ms_min": None, "tflops": None, "share_of_gemm": None,
                "peak_mib": None, "extra_mib": None,
                "error": errors.get("error", {}).get(pass_),
                "reference_error": errors.get("reference_error", {}).get(pass_),
                "error_rows": errors.get("rows"), "deterministic": errors.get("deterministic"),
            }  # fmt: skip
            if not taken.problem:
                row["ms_median"], row["ms_min"] = (
                    1e3 * statistics.median(times), 1e3 * min(times),
                )  # fmt: skip
                units = self.job.units[pass_]
                if units is not None:
                    row["tflops"] = units * self.flop(n, m, d) / row["ms_median"] / 1e9
                    rate = self.rates.get(dtype)
                    row["share_of_gemm"] = row["tflops"] / rate if rate else None
                if taken.extra_mib is not None and pass_ == known[-1]:
                    row["extra_mib"] = taken.extra_mib
                    row["peak_mib"] = taken.extra_mib + errors.get("resting_mib", 0.0)
            check_row(f"{name} {pass_}", row)
            with self.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def expected(self, names: list[str], n: int, m: int, d: int, dtype: str, calls: int) -> float:
        """Seconds that a case will take, by the speed that was measured at another size; it decides
        what is skipped, and is no figure of any row."""
        known = [self.speed.get((name, dtype)) for name in names]
        return sum(calls * self.flop(n, m, d) / speed for speed in known if speed)

    def case(self, dtype: str, n: int, d: int, names: list[str], *, once: bool = False) -> None:
        m = self.plan.gallery if self.job.gallery else n
        calls = 1 if once else 5
        if self.left() <= 0 or self.expected(names, n, m, d, dtype, calls) > self.left():
            for name in names:
                problem = f"skipped: would not fit in the {self.seconds:.0f} s of this part"
                self.write(name, n, m, d, dtype, Taken(problem=problem), {})
            return
        inputs = self.job.inputs(n, m, d, dtype, 0)
        makers = {name: partial(self.made, name, inputs, n, d, dtype, once) for name in names}
        seconds = 0.0 if once else min(self.plan.seconds, self.left())
        taken = in_turns(makers, seconds=seconds, least=1 if once else 3)
        resting = sum(t.numel() * t.element_size() for group in inputs for t in group)
        resting += sum(t.numel() * t.element_size() for t in inputs[0])  # the gradients
        del inputs, makers
        give_memory_back()
        playing = [name for name in names if not taken[name].problem]
        for name in playing:
            self.speed[name, dtype] = self.flop(n, m, d) / min(taken[name].seconds)
        errors = self.errors(d, dtype, playing)
        for name in names:
            found = {**errors.get(name, {}), "resting_mib": resting / 2**20}
            self.write(name, n, m, d, dtype, taken[name], found)
            if taken[name].problem.startswith("not run"):
                self.absent.add(name)

    def made(self, name: str, inputs: Any, n: int, d: int, dtype: str, once: bool) -> Contestant:
        if name in UNCOMPARED and not self.plan.compiles:
            raise NotRun("compiling takes longer than all else at these sizes")
        one = contestant(self.job, self.op, name, inputs, n, d, dtype)
        if once:
            one.setting += ", deterministic mode, one call"
            one.warm_up = lambda: None  # it was warmed up at another size
        return one

    def errors(self, d: int, dtype: str, playing: list[str]) -> dict:
        found: dict[str, Any] = {}
        for name in playing:
            if name == FLOOR or name in UNCOMPARED:
                continue
            if (key := (name, d, dtype)) not in self.known_errors:
                try:
                    of = errors_of(self.job, self.op, d, dtype, name, self.plan)
                except Exception as error:  # the others are compared all the same
                    print(f"{name}: no error, {type(error).__name__}: {error}", flush=True)
                    of = {}
                self.known_errors[key] = of
                give_memory_back()
            found[name] = self.known_errors[key]
        return found

    def run(self) -> None:
        for dtype, n, d in self.plan.cases:
            self.case(dtype, n, d, [name for name in names_of(self.job) if name not in self.absent])

    def large(self) -> None:
        """Each alone: what is measured is kept if the next one takes too long. In deterministic
        mode nothing is tuned, so that neither time nor memory is that of the tuner."""
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        dtype, n, d = "bf16", self.plan.large, self.plan.cases[0][2]
        for name in OURS:
            try:
                inputs = self.job.inputs(n // 16, n // 16, d, dtype, 0)
                one = contestant(self.job, self.op, name, inputs, n // 16, d, dtype)
                one.run()
                self.speed[name, dtype] = self.flop(n // 16, n // 16, d) / timed(one.run)
                del one, inputs
            except Exception as error:  # the case itself will say so
                print(f"{name}: {error}", flush=True)
            self.case(dtype, n, d, [name], once=True)

    def warm(self) -> None:
        for dtype in dict.fromkeys(dtype for dtype, *_ in self.plan.cases):
            rows = WARM_ROWS if DEVICE != "cpu" else self.plan.error_rows
            for name in own_names(self.job):
                try:
                    inputs = self.job.inputs(rows, rows, self.plan.cases[0][2], dtype, 0)
                    contestant(self.job, self.op, name, inputs, rows, 0, dtype).run()
                except NotRun:
                    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="+", choices=JOBS, metavar="OP")
    parser.add_argument("--plan", choices=PLANS, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--facts", type=Path, help="JSON with the measured rates of GEMMs")
    parser.add_argument("--seconds", type=float, required=True)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--large", action="store_true")
    mode.add_argument("--warm", action="store_true")
    given = parser.parse_args()
    rates = {}
    if given.facts is not None and given.facts.is_file():
        facts = json.loads(given.facts.read_text())
        rates = {"bf16": facts["gemm_tflops"], "fp32": facts["gemm_tflops_fp32"]}
    end = time.perf_counter() + given.seconds
    for done, op in enumerate(given.ops):
        # What one operator does not use, the later ones have.
        seconds = (end - time.perf_counter()) / (len(given.ops) - done)
        worker = Worker(op, PLANS[given.plan], given.rows, rates, seconds)
        (worker.large if given.large else worker.warm if given.warm else worker.run)()


if __name__ == "__main__":
    main()
