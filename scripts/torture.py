"""Interrupts, damages and misuses tiny runs, and checks what docs/reliability.md promises.

    .venv/bin/python scripts/torture.py [--quick] [--parts=kills,damage,wrong,soak]
        [--kills=N] [--signals=N] [--wrong=N] [--soak=STEPS] [--seed=N]
        [--results=FILE.jsonl] [--scratch=DIR]

- kills: processes of experiments.main end by SIGKILL, SIGTERM and SIGINT at random moments: while
  they start, train, save and evaluate. The same command goes on, until the run is finished. Its
  last state, its records and its final.json must be those of a run without interruptions, to the
  bit. Images and language; masked, always sparse, and always sparse with a delayed refresh.
- damage: every file of a checkpoint and of a workdir is truncated, emptied, changed in one bit,
  removed, and replaced by a folder. Each must be named, and passed over or refused in one line.
- wrong: commands, configs and data files with mistakes (see scripts/wrong_inputs.py). Each must end
  with one line and status 2, and change no file.
- soak: one long run that chooses its sets at every step and saves every 50. Its memory, its open
  files, its threads and its CPU time for each step must not grow.

The long form is the default, and it takes hours; `--quick` does a few of each without the soak.
`--results` appends a line for each case, and a case that the file holds is not done again. The
exit status is 1 if a case failed. The last line is JSON: how many cases held, by part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import main as training
from experiments.config import command_line
from experiments.records import restore, workdir
from experiments.signals import RESUMABLE
from scripts import wrong_inputs

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("kills", "damage", "wrong", "soak")
LIMIT = 600  # seconds after which a command counts as one that hangs
IMAGES, TEXT = "configs/quickstart.py:90/80,smoke", "configs/enwik8_small.py:90/80,smoke"
SHORT = ("steps=24", "log_every=3", "checkpoint_every=4", "eval_every=10")
ALWAYS_SPARSE = ("method.always_sparse=True",)
DELAYED = (*ALWAYS_SPARSE, "method.refresh_every=3", "method.refresh_delay=1")
HOLDINGS = {"masked": (), "always sparse": ALWAYS_SPARSE, "delayed": DELAYED}
# How a process that was asked to stop may end; SIGTERM, also before Python runs.
STOPPED = (0, RESUMABLE, -signal.SIGTERM)
MOMENTS = ("start", "step", "save", "save", "any")
CHAIN = {signal.SIGKILL: 9, signal.SIGTERM: 2, signal.SIGINT: 2}
# Thread pools start their threads one by one, up to a limit.
GROWTH = {"memory": 1.1, "descriptors": 1.0, "threads": 1.1, "cpu_per_step": 1.25}


@dataclasses.dataclass
class Results:
    """The cases that were done, in this process and in earlier ones."""

    path: Path | None
    done: dict[str, dict[str, Any]]

    def add(self, part: str, case: str, problem: str | None, **found: Any) -> None:
        """Notes how a case ended; `problem` says what did not hold."""
        record = {"part": part, "case": case, "problem": problem, **found}
        self.done[f"{part} {case}"] = record
        if self.path is not None:
            with open(self.path, "a") as file:
                print(json.dumps(record), file=file)
        print(f"{part}: {case}: {problem or 'ok'}", flush=True)

    def has(self, part: str, case: str) -> bool:
        """Whether a case was done."""
        return f"{part} {case}" in self.done

    def of(self, part: str) -> list[dict[str, Any]]:
        """The cases of a part."""
        return [record for record in self.done.values() if record["part"] == part]


@dataclasses.dataclass(frozen=True)
class Form:
    """A run: the arguments of experiments.main, but for the folder."""

    name: str
    arguments: tuple[str, ...]

    def command(self, directory: Path, *more: str) -> list[str]:
        """The whole command line in a process of its own."""
        flags = [*self.arguments, f"--workdir={directory}", *more]
        return [sys.executable, "-m", "experiments.main", *flags]


def forms(scratch: Path) -> list[Form]:
    """Images and language, in each way to hold the parameters."""
    text = scratch / "text.txt"
    wrong_inputs.write_text(text)
    language = ("data.name=text_file", f"data.file={text}", "model.dropout=0.1")
    return [
        Form(f"{task} {holding}", (f"--config={spec}", *wrong_inputs.overrides(*SHORT, *own, *how)))
        for holding, how in HOLDINGS.items()
        for task, spec, own in (("images", IMAGES, ()), ("language", TEXT, language))
    ]


@command_line.command
def main(argv: list[str]) -> int:
    """Runs the command line."""
    args = _parser().parse_args(argv)
    results = Results(args.results and Path(args.results), {})
    if results.path is not None and results.path.exists():
        records = map(json.loads, results.path.read_text().splitlines())
        results.done = {f"{r['part']} {r['case']}": r for r in records}
    with contextlib.ExitStack() as stack:
        made = args.scratch or stack.enter_context(tempfile.TemporaryDirectory(prefix="torture-"))
        scratch = Path(made).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        for part in args.parts:
            _do(part, args, scratch, results)
    return _summary(results)


def _do(part: str, args: Any, scratch: Path, results: Results) -> None:
    quick, seed = args.quick, args.seed
    if part == "kills":
        kills, signals = (1, 1) if quick else (args.kills, args.signals)
        interrupt_runs(forms(scratch)[:1] if quick else forms(scratch), kills, signals, seed,
                       scratch / "kills", results)  # fmt: skip
    elif part == "damage":
        damage_runs(forms(scratch)[:: 6 if quick else 2][:2], 6 if quick else 0, seed,
                    scratch / "damage", results)  # fmt: skip
    elif part == "wrong":
        misuse(40 if quick else args.wrong, seed, scratch / "wrong", results, files=not quick)
    elif not quick:
        soak(args.soak, scratch / "soak", results)


def environment(scratch: Path) -> dict[str, str]:
    """That of all processes: one CPU device, and programs that are compiled once."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return cache | os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


# Interruptions


@dataclasses.dataclass
class Pace:
    """How long a whole process takes, and how long until its first record, in seconds."""

    first: float
    whole: float


def interrupt_runs(
    made: Sequence[Form], kills: int, signals: int, seed: int, scratch: Path, results: Results
) -> None:
    """Interrupts runs, one after another in turn over the forms, until there were enough."""
    whole: dict[str, tuple[Pace, dict[str, Any]]] = {}
    for chain in range(10_000):
        form = made[chain % len(made)]
        counted = Counter[str]()
        for record in results.of("kills"):
            counted.update(record["interruptions"])
        left = {signal.SIGKILL: kills - counted["SIGKILL"]}
        left[signal.SIGTERM] = signals - counted["SIGTERM"] - counted["SIGINT"]
        if max(left.values()) <= 0:
            return
        case = f"{form.name} {chain}"
        if results.has("kills", case):
            continue
        if form.name not in whole:
            whole[form.name] = _uninterrupted(form, scratch)
        pace, expected = whole[form.name]
        rng = random.Random(f"{seed} {case}")
        planned = [number for number, times in CHAIN.items() for _ in range(times)]
        rng.shuffle(planned)
        if kills + signals < len(planned):
            planned = [signal.SIGKILL] * kills + [signal.SIGTERM] * signals
        directory = scratch / f"chain-{chain}"
        shutil.rmtree(directory, ignore_errors=True)
        moments, problems = _chain(form, directory, planned, pace, rng, scratch)
        if not problems:
            found = evidence(directory)
            problems += [
                f"another {key} at the end" for key in found if found[key] != expected[key]
            ]
        counts = Counter(name for name, _ in moments)
        results.add(
            "kills", case, "; ".join(problems) or None, interruptions=counts, moments=moments
        )
        if not problems:
            shutil.rmtree(directory)


def _uninterrupted(form: Form, scratch: Path) -> tuple[Pace, dict[str, Any]]:
    directory = scratch / form.name.replace(" ", "-")
    pace = Pace(0.0, 0.0)
    for again in range(2):  # The first time, programs are compiled, and processes take longer.
        shutil.rmtree(directory, ignore_errors=True)
        began = time.monotonic()
        process = _start(form.command(directory), directory, scratch)
        _changes(directory / workdir.METRICS, process, 2)
        pace.first = time.monotonic() - began
        if process.wait(LIMIT):
            raise RuntimeError(f"{form.name}: {_output(directory)}")
        pace.whole = time.monotonic() - began
        if not again:
            first = evidence(directory)
    if first != evidence(directory):
        raise RuntimeError(f"{form.name}: two runs without interruptions differ")
    return pace, first


def _chain(
    form: Form,
    directory: Path,
    planned: Sequence[signal.Signals],
    pace: Pace,
    rng: random.Random,
    scratch: Path,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Interrupts one run as planned, as long as it is not finished, and then lets it finish.

    Returns:
        The interruptions as pairs of a signal and a moment, and what was wrong.
    """
    moments: list[tuple[str, str]] = []
    for number in planned:
        moment = rng.choice(MOMENTS)
        process = _start(form.command(directory), directory, scratch)
        reached = _reach(moment, process, directory, pace, rng)
        process.send_signal(number)
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            return moments, [f"{number.name} at {moment}: still there after {LIMIT} s"]
        text = _output(directory)
        if reached:
            moments.append((number.name, moment))
        allowed = (0, -number) if number == signal.SIGKILL or not reached else STOPPED
        if status not in allowed or "Traceback" in text:
            return moments, [f"{number.name} at {moment}: status {status}: {text[-2000:]}"]
        if (directory / workdir.FINAL).exists():
            break
    last = subprocess.run(
        form.command(directory), cwd=ROOT, env=environment(scratch), capture_output=True, text=True,
        timeout=LIMIT,
    )  # fmt: skip
    problems = [] if last.returncode == 0 else [f"did not go on: {last.stdout}{last.stderr}"]
    return moments, problems


def _start(command: Sequence[str], directory: Path, scratch: Path) -> subprocess.Popen[bytes]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment(scratch))


def _output(directory: Path) -> str:
    return Path(f"{directory}.log").read_text(errors="replace")


def _reach(
    moment: str, process: subprocess.Popen[bytes], directory: Path, pace: Pace, rng: random.Random
) -> bool:
    """Waits for a moment; returns whether the process still ran then."""
    if moment == "save":
        _changes(directory / workdir.CHECKPOINTS, process, rng.randint(1, 8))
        wait = rng.uniform(0, 0.1)
    elif moment == "step":
        _changes(directory / workdir.METRICS, process, rng.randint(1, 6))
        wait = rng.uniform(0, 0.3)
    else:
        wait = rng.uniform(0, pace.first if moment == "start" else pace.whole)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        return True
    return False


def _changes(path: Path, process: subprocess.Popen[bytes], times: int) -> None:
    """Waits until what is at a path, and in a folder there, has changed so many times."""

    def look() -> Any:
        try:
            here = path.stat()
            names = sorted(os.listdir(path)) if path.is_dir() else ()
            return here.st_size, here.st_ino, names
        except OSError:
            return None

    before = look()
    while times and process.poll() is None:
        time.sleep(0.001)
        now = look()
        times, before = times - (now != before), now


def evidence(directory: Path) -> dict[str, Any]:
    """What must be equal at the end of two runs, but for what depends on the machine."""
    saved = restore.read(directory)
    state = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(saved.state):
        array = np.asarray(leaf)
        state.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        state.update(array.tobytes())
    lines = (directory / workdir.METRICS).read_text().splitlines()
    return {
        "state": state.hexdigest(),
        "data position": {k: v for k, v in saved.hosts[0].items() if k != "seconds"},
        "metrics.jsonl": [
            {k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines
        ],
        "final.json": {
            k: v
            for k, v in workdir.read_json(directory / workdir.FINAL).items()
            if k not in ("seconds", "date")
        },
    }


# Damage


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": _truncate,
    "emptied": _empty,
    "flipped": _flip,
    "removed": Path.unlink,
    "a folder": _folder,
}


def damage_runs(
    made: Sequence[Form], sample: int, seed: int, scratch: Path, results: Results
) -> None:
    """Damages each file of the newest checkpoint, with an older one beside it and without."""
    for form in made:
        saved = scratch / form.name.replace(" ", "-")
        saved.parent.mkdir(parents=True, exist_ok=True)
        stopped = call(training.main, [*form.arguments, f"--workdir={saved}", "--stop_at=8"])
        if stopped.status:
            raise RuntimeError(f"{form.name}: {stopped}")
        newest = saved / workdir.CHECKPOINTS / "8"
        cases = [
            (path.relative_to(newest), how, alone)
            for path in sorted(p for p in newest.rglob("*") if p.is_file())
            for how in DAMAGES
            for alone in ((False, True) if path.parent.name == "meta" else (False,))
            if path.stat().st_size or how in ("removed", "a folder")
        ]
        if sample:
            cases = random.Random(seed).sample(cases, sample)
        for name, how, alone in cases:
            # Names of Orbax's data files differ from save to save.
            case = f"{form.name}, {name}, {how}, {'alone' if alone else 'beside an older one'}"
            if results.has("damage", case):
                continue
            copy = scratch / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(saved, copy)
            if alone:
                shutil.rmtree(copy / workdir.CHECKPOINTS / "4")
            DAMAGES[how](copy / workdir.CHECKPOINTS / "8" / name)
            ended = call(training.main, [*form.arguments, f"--workdir={copy}", "--stop_at=4"])
            results.add("damage", case, _damage_problem(ended, copy, alone))


def _damage_problem(ended: Called, copy: Path, alone: bool) -> str | None:
    named = [line for line in ended.err.splitlines() if str(copy / workdir.CHECKPOINTS) in line]
    if ended.failure:
        return ended.failure
    if "checkpoint of step 8" in ended.out:
        return "the damaged checkpoint was used"
    if len(named) != 1 or len(ended.err.splitlines()) != 1:
        return f"not one line that names it: {ended.err!r}"
    passed_over = ended.status == 0 and "checkpoint of step 4" in ended.out
    anew = alone and ended.status == 0 and "going on" not in ended.out
    if ended.status == 2 or passed_over or anew:
        return None
    return f"status {ended.status}: {ended.out!r}"


# Misuse


@dataclasses.dataclass
class Called:
    """How a command ended in this process; `failure` is a traceback, or that it hung."""

    status: int | None
    out: str
    err: str
    failure: str | None = None


class _HangError(BaseException):
    """Not an Exception, so that no command takes it for one of its own."""


def call(command: Callable[[list[str]], int], argv: Sequence[str], limit: int = LIMIT) -> Called:
    """Calls the main function of a command as its process would."""

    def hangs(*_: object) -> None:
        raise _HangError

    out, err, status, failure = io.StringIO(), io.StringIO(), None, None
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(limit)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command(list(argv))
    except _HangError:
        failure = f"hangs: still there after {limit} s"
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        failure = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return Called(status, out.getvalue(), err.getvalue(), failure)


def misuse(count: int, seed: int, scratch: Path, results: Results, files: bool = True) -> None:
    """Does what scripts/wrong_inputs.py makes; one in fifty also in a process of its own."""
    cases = list(wrong_inputs.make(scratch, call, files))
    rng = random.Random(seed)
    if count:
        cases = rng.sample(cases, min(count, len(cases)))
    for case in cases:
        if results.has("wrong", case.name):
            continue
        before = contents(scratch)
        says = case.module.endswith("prepare")  # what it does, before it does it
        problem = _refusal_problem(call(case.command, case.argv, 120), says)
        alone = rng.random() < 0.02 and not any("\0" in text for text in case.argv)  # no shell can
        if problem is None and alone:
            problem = _refusal_problem(_in_a_process(case, scratch), says)
        changed = contents(scratch) ^ before
        if says:  # tensorflow-datasets makes its folders first, and leaves them empty
            changed = {entry for entry in changed if Path(entry[0]).is_file()}
        if problem is None and changed:
            problem = f"touched {sorted(changed)[:4]}"
        wrong_inputs.clean(scratch)
        results.add("wrong", case.name, problem, argv=case.argv)


def _in_a_process(case: wrong_inputs.Case, scratch: Path) -> Called:
    command = [sys.executable, "-m", case.module, *case.argv]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, cwd=ROOT,
            env=environment(scratch.parent),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Called(None, "", "", f"hangs: still there after {LIMIT} s")
    return Called(ended.returncode, ended.stdout, ended.stderr)


def _refusal_problem(ended: Called, says: bool = False) -> str | None:
    if ended.failure:
        return ended.failure
    if ended.status != 2:
        return f"status {ended.status}: {ended.out[-500:]!r} {ended.err[-500:]!r}"
    if (
        not ended.err.startswith("error: ")
        or ended.err.count("\n") != 1
        or (ended.out and not says)
    ):
        return f"not one line: {ended.out[-500:]!r} {ended.err[-1500:]!r}"
    return None


def contents(folder: Path) -> set[tuple[str, int, int]]:
    """The files and folders there, with their sizes and times."""
    found = ((str(p), p.lstat()) for p in folder.rglob("*"))
    return {(path, s.st_size, s.st_mtime_ns) for path, s in found}


# Soak


def soak(steps: int, scratch: Path, results: Results) -> None:
    """One long run; the medians of the last tenth may not exceed those of the second."""
    if results.has("soak", f"{steps} steps"):
        return
    every = max(steps // 100, 1)
    own = (f"steps={steps}", "method.refresh_every=1", "checkpoint_every=50", f"log_every={every}")
    form = Form("soak", (f"--config={IMAGES}", *wrong_inputs.overrides(*own)))
    directory = scratch / "run"
    shutil.rmtree(directory, ignore_errors=True)
    process = _start(form.command(directory), directory, scratch)
    samples: list[dict[str, float]] = []
    while process.poll() is None:
        _changes(directory / workdir.METRICS, process, 1)
        with contextlib.suppress(OSError, ValueError, IndexError):
            samples.append(_sample(process.pid, directory))
    samples = [now for now, before in zip(samples[1:], samples, strict=False)
               if now["step"] > before["step"]]  # fmt: skip
    if process.returncode or len(samples) < 20:
        results.add("soak", f"{steps} steps", f"status {process.returncode}: {_output(directory)}")
        return
    medians = {}
    for name, start, stop in (("second", 0.1, 0.2), ("last", 0.9, 1.0)):
        part = [s for s in samples if start * steps < s["step"] <= stop * steps]
        medians[name] = {
            key: statistics.median(s[key] for s in part) for key in GROWTH if key in part[0]
        }
        passed = part[-1]["step"] - part[0]["step"]
        medians[name]["cpu_per_step"] = (part[-1]["cpu"] - part[0]["cpu"]) / passed
    ratios = {key: medians["last"][key] / medians["second"][key] for key in GROWTH}
    grown = [key for key in GROWTH if ratios[key] > GROWTH[key]]
    problem = f"grown: {', '.join(grown)}" if grown else None
    results.add("soak", f"{steps} steps", problem, medians=medians, ratios=ratios)
    print(json.dumps({"medians": medians, "ratios": ratios}))


def _sample(pid: int, directory: Path) -> dict[str, float]:
    """What a process holds now, and the step of its last record."""
    at = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (at / "status").read_text().splitlines())
    times = (at / "stat").read_text().rpartition(")")[2].split()
    last = (directory / workdir.METRICS).read_text().splitlines()[-1]
    return {
        "memory": float(status["VmRSS"].split()[0]) / 1024,
        "descriptors": float(len(os.listdir(at / "fd"))),
        "threads": float(status["Threads"]),
        "cpu": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        "step": float(json.loads(last)["step"]),
    }


def _summary(results: Results) -> int:
    failed = [r for r in results.done.values() if r["problem"]]
    for record in failed:
        print(f"FAILED {record['part']}: {record['case']}: {record['problem']}", file=sys.stderr)
    totals = Counter(record["part"] for record in results.done.values())
    held = totals - Counter(record["part"] for record in failed)
    found: dict[str, Any] = {p: {"held": held[p], "of": totals[p]} for p in PARTS if totals[p]}
    interruptions = Counter[str]()
    for record in results.of("kills"):
        interruptions.update(record["interruptions"])
    print(json.dumps(found | {"interruptions": interruptions}))
    return int(bool(failed))


def _parser() -> command_line.Parser:
    parser = command_line.Parser(prog="torture.py", description=__doc__)
    count = command_line.positive
    parser.add_argument("--quick", action="store_true", help="a few of each, without the soak")
    parser.add_argument("--parts", type=command_line.some_of(PARTS), default=list(PARTS))
    parser.add_argument("--kills", type=count, default=50, help="SIGKILLs at least")
    parser.add_argument("--signals", type=count, default=20, help="SIGTERMs and SIGINTs at least")
    parser.add_argument("--wrong", type=count, default=0, help="wrong inputs; all if not given")
    parser.add_argument("--soak", type=count, default=10_000, help="steps of the long run")
    parser.add_argument("--seed", type=count, default=1)
    parser.add_argument("--results", type=command_line.path, help="a file of JSON lines")
    parser.add_argument("--scratch", type=command_line.path, help="where the runs are; else /tmp")
    return parser


if __name__ == "__main__":
    sys.exit(main())
