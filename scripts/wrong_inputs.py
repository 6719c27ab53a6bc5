"""Wrong commands, configs and data files for scripts/torture.py, made from what the commands take.

Flags come from the `--help` of each command, keys from the default configs, keys of saved files
from a run's own `config.json` and `final.json`; each gets values of other types and ranges.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib
import json
import lzma
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from experiments import main as training
from experiments.config import resolve
from experiments.records import workdir
from experiments.reporting.groups import NEEDED

# Calls a command with arguments; the result has `status`, `out` and `err`.
Call = Callable[[Callable[[list[str]], int], Sequence[str]], Any]

Made = tuple[str, tuple[str, ...]]  # a command by its name, and its arguments

MODULES = {
    "main": "experiments.main",
    "sweep": "experiments.sweep",
    "report": "experiments.report",
    "export": "experiments.export",
    "convert": "experiments.convert",
    "generate": "experiments.language_modelling.generate",
    "prepare": "experiments.language_modelling.prepare",
}
IMAGES, TEXT = "configs/quickstart.py:90/80,smoke", "configs/enwik8_small.py:90/80,smoke"
HUGE = "1" + 30 * "0"
# By the type of the default: what a key of a config cannot be.
WRONG_VALUES: dict[type, tuple[str, ...]] = {
    int: ("x", "1.5", "", "None", "-7", HUGE, "[1]", "nan", "True", "\uff13"),
    float: ("x", "", "nan", "inf", "-7", "None", "[1]", "1e400"),
    bool: ("2", "x", "None", ""),
    str: ("no such", "\0", "x" * 5000),
    tuple: ("x", "((1,),)", '{"a": 1}', "((1, 2),)"),
    type(None): ("x", "[1]", "{}", "-7", "()"),
}
# What flags that take any text but one of another kind cannot be.
WRONG_FLAGS = {
    "--stop_at": ("0", "-1", "x", "1.5", "\u0663", HUGE + "x"),
    "--seeds": ("0", "-1", "x", "1e3"),
    "--jobs": ("0", "-1", "x"),
    "--tokens": ("0", "-1", "x", "1.5"),
    "--only": ("x", "-1", "999", "\u00b2", "0,", "0-1"),
    "--to": ("x", "dense", "MASKED"),
    "--form": ("x", "dense,bsr"),
    "--temperature": ("x", "-1", "nan", "inf"),
    "--top_k": ("x", "-1", "1.5"),
    "--top_p": ("x", "-1", "2", "nan", "0"),
    "--seed": ("x", "-1", "1.5", str(2**32)),
    "--workdir": ("", " ", "/dev/null", "/dev/null/run", "gs://bucket/run", "x" * 5000,
                  "~no-such-user/run"),
    "--out": ("", "/dev/null/x.npz", "gs://bucket/x.npz", "x" * 5000),
    "--params": ("no_such.npz", "/dev/null", "README.md"),
    "--config": ("", "no_such.py", "README.md", "configs", ":smoke", "configs/quickstart.py:x",
                 "configs/quickstart.py:90/80,dense", "configs/quickstart.py:80/90",
                 "configs/quickstart.py:100/0", "configs/quickstart.py:nan/80",
                 "configs/quickstart.py:-1/80", "configs/quickstart.py:static-100",
                 "configs/quickstart.py:top_kast-90", "configs/cifar10_small.py:2x,5x",
                 "configs/cifar10_small.py:all-sparse,last-sparse",
                 "configs/sweeps/table_1.py:tiny", "configs/sweeps/quickstart.py:tiny"),
    "--prompt": ("", "\N{SNOWMAN}", "\udcff"),
}  # fmt: skip
MAY_BE_EMPTY = ("--data_dir", "--manual_dir")


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that must be refused."""

    name: str
    module: str
    argv: tuple[str, ...]

    @property
    def command(self) -> Callable[[list[str]], int]:
        """The main function of the command."""
        found: Callable[[list[str]], int] = importlib.import_module(self.module).main
        return found


def overrides(*texts: str) -> list[str]:
    """The flags that set keys of a config, from texts `KEY=VALUE`."""
    return [f"--config.{text}" for text in texts]


def write_text(path: Path, size: int = 60_000) -> None:
    """Writes a text of made-up words, always the same."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(300)]
    path.write_text(" ".join(rng.choices(words, k=size // 6))[:size])


def make(scratch: Path, call: Call, files: bool = True) -> Iterator[Case]:
    """Yields the cases, after the files that they name were made, unless they are there.

    Args:
        scratch: the folder of the files. The commands would write to `scratch/new*`.
        call: runs a command in this process.
        files: whether there are cases with files, for which two tiny runs are trained.
    """
    inputs = scratch / "inputs"
    if files and not (inputs / "made").exists():
        shutil.rmtree(scratch, ignore_errors=True)
        inputs.mkdir(parents=True)
        _make_runs(inputs, call)
        _make_text_files(inputs)
        _make_image_folders(inputs)
        _make_config_files(inputs)
        _make_exported_files(inputs)
        _make_workdirs(inputs)
        (inputs / "made").touch()
    right = _right_commands(scratch)
    made = [*_wrong_flags(right, call), *_wrong_keys(right)]
    if files:
        made += _wrong_files(right, inputs)
    for command, argv in dict.fromkeys(made):
        label = f"{command} {' '.join(argv)}".replace(str(scratch), "SCRATCH")
        if len(label) > 300:
            label = f"{label[:200]}… {hashlib.sha256(label.encode()).hexdigest()[:8]}"
        yield Case(label, MODULES[command], argv)


def clean(scratch: Path) -> None:
    """Removes what a command that was not refused has written."""
    for path in scratch.glob("new*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _right_commands(scratch: Path) -> dict[str, dict[str, str]]:
    """By command, flags with which it would be accepted; "" names an argument without a flag."""
    new, inputs = str(scratch / "new"), scratch / "inputs"
    return {
        "main": {"--config": IMAGES, "--workdir": new},
        "sweep": {"--config": "configs/sweeps/quickstart.py", "--workdir": new},
        "report": {"": str(inputs / "images"), "--out": new},
        "export": {"--workdir": str(inputs / "images"), "--out": f"{new}.npz"},
        "convert": {"--workdir": str(inputs / "images"), "--out": new, "--to": "always_sparse"},
        "generate": {"--workdir": str(inputs / "text"), "--prompt": "a", "--tokens": "1"},
        "prepare": {"": "enwik8", "--manual_dir": str(inputs / "nothing"), "--data_dir": new},
    }


def _case(name: str, flags: dict[str, str], *more: str) -> Made:
    given = (f"{flag}={value}" if flag else value for flag, value in flags.items())
    return name, (*given, *more)


def _wrong_flags(right: dict[str, dict[str, str]], call: Call) -> Iterator[Made]:
    for name, flags in right.items():
        text = call(importlib.import_module(MODULES[name]).main, ["--help"]).out
        known = dict(re.findall(r"^  (--\w+)( [A-Z{]\S*)?", text, re.MULTILINE))
        yield from (_case(name, flags, wrong) for wrong in ("--no_such=1", "-z"))
        yield _case(name, {})
        for flag, takes in known.items():
            others = {k: v for k, v in flags.items() if k != flag}
            if flag in flags and flag not in MAY_BE_EMPTY and name != "prepare":
                yield _case(name, others)
            if not takes:
                yield _case(name, flags, f"{flag}=1")
                yield _case(name, flags, flag, flag)
                continue
            value = flags.get(flag, "1")
            yield _case(name, others, f"{flag}={value}", f"{flag}={value}")
            yield _case(name, others, flag)
            yield _case(name, others, f"{flag[:-1]}={value}")
            yield _case(name, others, f"{flag.upper()}={value}")
            if flag not in MAY_BE_EMPTY:
                yield _case(name, others, f"{flag}=")
            for wrong in WRONG_FLAGS.get(flag, ()):
                yield _case(name, others, f"{flag}={wrong}")
        if "" in flags:
            yield _case(name, flags | {"": "no such"})
        else:
            yield _case(name, flags, "extra")


def _wrong_keys(right: dict[str, dict[str, str]]) -> Iterator[Made]:
    always_sparse = ("method.always_sparse=True",)
    for spec, own in ((IMAGES, ()), (IMAGES, always_sparse), (TEXT, ())):
        config = resolve(spec, own)
        flags = right["main"] | {"--config": spec}
        for key, default in workdir.flat(config.to_dict()).items():
            if key.startswith("derived."):
                continue
            more = overrides(*(text for text in own if not text.startswith(key + "=")))
            yield _case("main", flags, *more, f"--config.{key}x=1")
            yield _case("main", flags, *more, f"--config.{key}")
            yield _case("main", flags, *more, f"--config.{key}.x=1")
            for wrong in WRONG_VALUES.get(type(default), ()):
                if key.endswith(".clamp") and wrong == "-7":  # as 0: no limit
                    continue
                yield _case("main", flags, *more, f"--config.{key}={wrong}")
        for section in ("model", "data", "method", "optimizer", "optimizer.schedule", "mesh"):
            yield _case("main", flags, f"--config.{section}=1")
        yield _case("main", flags, "--config.derived.learning_rate=1")
    bad_rules = ("5",
                 '((".*",None),)', '((".*","half"),)', '(("(","sparse"),)', '(("x","sparse"),)',
                 '((".*",{"forward_density":2}),)', '((".*",{"pattern":5}),)', '((".*","dense"),)',
                 '((".*","sparse"),("stem/kernel","dense"))', '((".*","sparse",1),)')  # fmt: skip
    for rules in bad_rules:
        yield _case("main", right["main"], f"--config.method.rules={rules}")
    together = (
        ("method.forward_density=0.3",),
        ("method.pattern=block:5x5",),
        ("method.pattern=2:1",),
        ("mesh.data=3",),
        ("mesh.fsdp=3",),
        ("mesh.data=-1", "mesh.fsdp=-1"),
        ("batch_size=4001",),
        ("optimizer.schedule.warmup_steps=3",),
        ("optimizer.schedule.name=step",),
        ("optimizer.b1=0.5",),
        ("optimizer.name=adam", "optimizer.b1=1.0"),
        ("optimizer.name=adam", "optimizer.b2=1.0"),
        ("data.image_size=4097",),
        ("model.name=lenet_300_100", "data.image_size=32"),
        *((f"{key}.name=os:getcwd",) for key in ("data", "model", "method")),
        *((f"{key}.name=os:sep",) for key in ("data", "model", "method")),
        ("data.workers=1",),
        ("method.refresh_delay=1",),
        ("method.always_sparse=True", "method.inner_state=keep"),
        ("method.always_sparse=True", "method.refresh_delay=2"),
        ("method.name=dense", "method.refresh_every=1"),
        ("method.name=snip", "method.backward_density=0.1"),
        ("model.name=experiments.nowhere:model",),
        ("data.name=tensorflow_datasets:no_such_set",),
    )
    for texts in together:
        yield _case("main", right["main"], *overrides(*texts))
    yield _case("main", right["main"], "--config.steps", "5")
    yield _case("main", right["main"], "--describe")
    yield _case("sweep", right["sweep"], "--slurm", "--jobs=2")
    for texts in (("data.name=image_folder", "data.dir=no_such"), ("batch_size=4001",)):
        yield _case("sweep", right["sweep"], *overrides(*texts))


def _wrong_files(right: dict[str, dict[str, str]], inputs: Path) -> Iterator[Made]:
    text = right["main"] | {"--config": TEXT}
    for path in sorted((inputs / "texts").iterdir()):
        level = path.name.partition("-")[0]
        own = overrides("data.name=text_file", f"data.file={path}", f"data.level={level}")
        yield _case("main", text, *own)
    missing = overrides("data.name=text_file", "data.file=no_such.txt")
    yield _case("main", text, *missing)
    yield _case("main", text, *overrides("data.name=text_file"))
    yield _case("main", text, *overrides("data.name=enwik8", f"data.dir={inputs}/nothing"))
    for path in sorted((inputs / "folders").iterdir()):
        own = overrides("data.name=image_folder", f"data.dir={path}", "batch_size=4")
        yield _case("main", right["main"], *own)
    for path in sorted((inputs / "configs").iterdir()):
        yield _case("main", right["main"] | {"--config": str(path)})
        yield _case("sweep", right["sweep"] | {"--config": str(path)})
    for path in sorted((inputs / "exported").iterdir()):
        yield _case("generate", right["generate"], f"--params={path}")
    for path in sorted((inputs / "workdirs").iterdir()):
        for name in ("export", "convert"):
            yield _case(name, right[name] | {"--workdir": str(path)})
    for path in sorted((inputs / "text_workdirs").iterdir()):
        yield _case("generate", right["generate"] | {"--workdir": str(path)})
    for path in sorted((inputs / "finals").iterdir()):
        yield _case("report", right["report"] | {"": str(path)})
        if path.name in ("empty", "cut", "list", "null", "number", "no-json", "deep"):
            yield _case("main", right["main"] | {"--workdir": str(path)})
    for path in sorted((inputs / "claimed").iterdir()):
        yield _case("main", right["main"] | {"--workdir": str(path)})
    for path in sorted((inputs / "archives").iterdir()):
        name = "wikitext103" if path.name.startswith("wikitext") else "enwik8"
        flags = right["prepare"] | {"": name, "--manual_dir": str(path)}
        yield _case("prepare", flags)


# Files


def _make_runs(inputs: Path, call: Call) -> None:
    """A finished run of each task, for the commands that read one."""
    for name, spec in (("images", IMAGES), ("text", TEXT)):
        ended = call(training.main, [f"--config={spec}", f"--workdir={inputs / name}"])
        if ended.status:
            raise RuntimeError(f"{spec}: {ended}")
    (inputs / "nothing").mkdir()


def _make_text_files(inputs: Path) -> None:
    folder = inputs / "texts"
    folder.mkdir()
    plain = inputs / "plain.txt"
    write_text(plain, 30_000)
    text = plain.read_bytes()
    latin = text.replace(b"a", "\xe4".encode("latin-1"))
    packed = {"xz": lzma.compress(text), "gz": gzip.compress(text)}
    with zipfile.ZipFile(inputs / "text.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", text)
    packed["zip"] = (inputs / "text.zip").read_bytes()
    files = {
        "byte-empty.txt": b"",
        "byte-short.txt": text[:100],
        **{f"{level}-one-symbol.txt": b"x" * 30_000 for level in ("byte", "character")},
        "word-one-symbol.txt": b"x\n" * 15_000,
        "word-latin.txt": latin,
        "character-latin.txt": latin,
        "word-utf-16.txt": text.decode().encode("utf-16"),
        "character-utf-16.txt": text.decode().encode("utf-16"),
        "word-cut.txt": text + b"\xe2\x82",
        "word-packed.txt": packed["gz"],
        "word-one-line.txt": b"x" * 30_000,
        "character-mark-only.txt": b"\xef\xbb\xbf",
    }
    for kind, data in packed.items():
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        files |= {
            f"byte-cut.{kind}": data[:half],
            f"byte-flipped.{kind}": flipped,
            f"byte-empty.{kind}": b"",
            f"byte-plain.{kind}": text,
        }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    with zipfile.ZipFile(folder / "byte-two.zip", "w") as archive:
        archive.writestr("one", text)
        archive.writestr("two", text)
    with zipfile.ZipFile(folder / "byte-none.zip", "w"):
        pass
    for kind in ("txt", *packed):
        (folder / f"byte-folder.{kind}").mkdir()
        os.mkfifo(folder / f"byte-fifo.{kind}")
        os.symlink(folder / "nowhere", folder / f"byte-link.{kind}")


def _make_image_folders(inputs: Path) -> None:
    folders = inputs / "folders"
    image = inputs / "image.png"
    Image.new("L", (28, 28), 7).save(image)
    png = image.read_bytes()
    Image.new("L", (28, 28), 7).save(inputs / "image.gif")

    def folder(name: str) -> Path:
        for split in ("train", "test"):
            for label in ("one", "two"):
                at = folders / name / split / label
                at.mkdir(parents=True)
                for i in range(4):
                    shutil.copy(image, at / f"{i}.png")
        return folders / name

    contents = {
        "cut": png[: len(png) // 2], "empty": b"", "text": b"no image", "header": png[:8],
        "gif": (inputs / "image.gif").read_bytes(), "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n",
    }  # fmt: skip
    for name, data in contents.items():
        for split in ("train", "test"):
            (folder(f"{name}-{split}") / split / "two" / "3.png").write_bytes(data)
    for split in ("train", "test"):
        at = folder(f"fifo-{split}") / split / "one" / "0.png"
        at.unlink()
        os.mkfifo(at)
        at = folder(f"folder-{split}") / split / "one" / "0.png"
        at.unlink()
        at.mkdir()
        at = folder(f"link-{split}") / split / "one" / "0.png"
        at.unlink()
        at.symlink_to(inputs / "nowhere")
        shutil.rmtree(folder(f"no-{split}") / split)
        shutil.rmtree(folder(f"no-class-{split}") / split / "one")
        for path in (folder(f"no-image-{split}") / split / "one").iterdir():
            path.unlink()
        for label in ("one", "two"):
            shutil.rmtree(folders / f"no-classes-{split}" / split / label, ignore_errors=True)
            (folders / f"no-classes-{split}" / split).mkdir(parents=True, exist_ok=True)
    one_class = folder("one-class")
    for split in ("train", "test"):
        shutil.rmtree(one_class / split / "one")
    (folders / "nothing").mkdir()
    (folders / "file").write_bytes(png)


def _make_config_files(inputs: Path) -> None:
    folder = inputs / "configs"
    folder.mkdir()
    texts = {
        "empty.py": "",
        "no_function.py": "get_config = get_sweep = None",
        "none.py": "def get_config(variant=''): pass\nget_sweep = get_config",
        "number.py": "def get_config(variant=''): return 5\nget_sweep = get_config",
        "dict.py": "def get_config(variant=''): return {}\nget_sweep = get_config",
        "config_dict.py": "from ml_collections import ConfigDict\n"
        "def get_config(variant=''): return ConfigDict({'a': 1})\n"
        "def get_sweep(): yield ('../x', 'configs/quickstart.py', {})",
        "exits.py": "import sys\nsys.exit(0)",
        "exits_later.py": "import sys\ndef get_config(variant=''): sys.exit(0)\n"
        "def get_sweep(): sys.exit(0)",
        "unknown_task.py": "from experiments.config import base_config\n"
        "def get_config(variant=''): return base_config('no_such')\n"
        "def get_sweep(): yield ('a', 'configs/no_such.py', {})",
        "unknown_variant.py": "from experiments.config import base_config, apply_variant\n"
        "def get_config(variant=''):\n  config = base_config('image_classification')\n"
        "  apply_variant(config, 'no_such')\n  return config\n"
        "def get_sweep(): yield ('a', 'configs/quickstart.py:no_such', {})",
        "wrong_value.py": "from experiments.config import base_config\n"
        "def get_config(variant=''):\n  config = base_config('image_classification')\n"
        "  config.steps = -1\n  return config\n"
        "def get_sweep(): yield ('a', 'configs/quickstart.py', {'steps': -1})",
        "twice.py": "from experiments.config import base_config\n"
        "def get_config(variant=''):\n  config = base_config('image_classification')\n"
        "  config.optimizer.name = 'no_such'\n  return config\n"
        "def get_sweep(): yield from [('a', 'configs/quickstart.py', {})] * 2",
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n")
    (folder / "folder.py").mkdir()
    (folder / "link.py").symlink_to(inputs / "nowhere")
    shutil.copy(folder / "number.py", folder / "number.txt")


def _make_exported_files(inputs: Path) -> None:
    from experiments import export

    folder = inputs / "exported"
    folder.mkdir()
    for kind in ("npz", "safetensors"):
        for form in ("dense", "compact", "bcoo"):
            whole = inputs / f"{form}.{kind}"
            export.write(inputs / "text", whole, form)
            if form == "bcoo":
                shutil.copy(whole, folder)
                continue
            data = whole.read_bytes()
            half = len(data) // 2
            (folder / f"{form}-cut.{kind}").write_bytes(data[:half])
            (folder / f"{form}-start.{kind}").write_bytes(data[:20])
            (folder / f"{form}-head-flipped.{kind}").write_bytes(bytes([data[0] ^ 1]) + data[1:])
        other = {"npz": "safetensors", "safetensors": "npz"}[kind]
        shutil.copy(inputs / f"compact.{kind}", folder / f"other.{other}")
        export.write(inputs / "images", folder / f"images.{kind}", "compact")
        (folder / f"empty.{kind}").touch()
        (folder / f"folder.{kind}").mkdir()
        os.mkfifo(folder / f"fifo.{kind}")


def _make_workdirs(inputs: Path) -> None:
    """Copies of the finished runs in which a file is another one."""
    for folder, run in (("workdirs", "images"), ("text_workdirs", "text")):
        (inputs / folder).mkdir()
        source = inputs / run
        config = workdir.read_json(source / workdir.CONFIG)
        keys = [key for key in workdir.flat(config) if not workdir.is_free(key)]
        for name, text in _spoiled(config, keys):
            # The checkpoints are not copied: the config is refused before they are read.
            copy = inputs / folder / name
            copy.mkdir()
            (copy / workdir.CONFIG).write_text(text)
            (copy / workdir.CHECKPOINTS).symlink_to(source / workdir.CHECKPOINTS)
        (inputs / folder / "nothing").mkdir()
        bare = inputs / folder / "no-checkpoints"
        bare.mkdir()
        shutil.copy(source / workdir.CONFIG, bare)
    (inputs / "finals").mkdir()
    final = workdir.read_json(inputs / "images" / workdir.FINAL)
    for name, text in _spoiled(final, [key for key in NEEDED if not key.endswith("name")]):
        copy = inputs / "finals" / name
        shutil.copytree(
            inputs / "images", copy, ignore=shutil.ignore_patterns("checkpoints", "tensorboard")
        )
        (copy / workdir.FINAL).write_text(text)
    (inputs / "claimed").mkdir()
    for name, config in (("other-program", {"model_type": "bert"}), ("nothing-in-it", {})):
        (inputs / "claimed" / name).mkdir()
        (inputs / "claimed" / name / workdir.CONFIG).write_text(json.dumps(config))
    for name in (workdir.METRICS, workdir.FINAL, workdir.CHECKPOINTS, workdir.TENSORBOARD):
        for kind in ("file", "folder"):
            if (name, kind) == (workdir.TENSORBOARD, "folder"):
                continue  # may be there
            copy = inputs / "claimed" / f"{name}-{kind}"
            copy.mkdir()
            if kind == "folder":
                (copy / name / "x").mkdir(parents=True)
            else:
                (copy / name).write_text("x")
    for damaged, data in (("cut", b"x" * 1000), ("empty", b"")):
        for name in ("enwik8", "enwik8.xz", "enwik8.zip", "wikitext-103-v1.zip"):
            at = inputs / "archives" / f"{name.partition('-')[0]}-{name}-{damaged}"
            at.mkdir(parents=True)
            (at / name).write_bytes(data)


def _spoiled(found: dict[str, Any], keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Texts that stand for a JSON file but lack one of the keys, or have it of another type."""
    whole = json.dumps(found)
    yield from (
        ("empty", ""),
        ("cut", whole[: len(whole) // 2]),
        ("list", "[]"),
        ("null", "null"),
        ("number", "5"),
        ("nothing-in-it", "{}"),
        ("no-json", "x"),
        ("deep", "[" * 100_000),
    )
    for key in keys:
        # The commands that read a run do not read where its data was, or what it evaluated.
        unread = key in ("data.dir", "data.file", "data.eval_split", "data.vocabulary")
        for how in ("missing", "object") if unread else ("missing", "text", "object"):
            copy = json.loads(whole)
            *parents, last = key.split(".")
            section = copy
            for parent in parents:
                section = section[parent]
            if how == "missing":
                del section[last]
            else:
                section[last] = {"text": "no such", "object": {"x": [1]}}[how]
            yield f"{key.replace('/', '_')}-{how}", json.dumps(copy)
