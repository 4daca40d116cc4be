"""Migrate every config below a folder, count the outcomes by kind, and check the written files.

    pip download --no-deps xtuner==0.2.0 && unzip -q xtuner-0.2.0-*.whl -d old
    python benchmarks/migrate.py old/xtuner/configs

Every written file is loaded again. Files that are not configs, such as scripts, are skipped.
`--reasons` lists why configs are refused, lose something, or are not supported yet. `--built-in`
compares the built-in settings with these names with the files.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from xtuner.config.builtin import catalog_xtuner0
from xtuner.config.load import load_settings
from xtuner.config.schema import Settings
from xtuner.errors import ConfigError
from xtuner.migrate import file
from xtuner.migrate.report import Draft

WORDED_ANEW = (
    *("SYSTEM", "evaluation_inputs", "evaluation_system", "evaluation_images"),
    *("data_path", "data_root", "image_folder", "pretrained_pth", "work_dir"),
    *("quantization", "double_quant", "dataloader_num_workers", "trust_remote_code"),
)
"""Settings that have equivalents, or that only the built-in has."""
ADAPTER = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
OUTCOMES = ("migrated", "with losses", "refused", "not yet")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reasons", action="store_true")
    parser.add_argument("--built-in", action="store_true")
    options = parser.parse_args()
    if options.built_in:
        compare_built_in(options.folder)
        return
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(paths(options.folder)):
            try:
                draft = file.read(path)
            except ConfigError as error:
                if "needs no migration" not in str(error):
                    counts["unreadable"]["refused"] += 1
                    reasons[f"unreadable: {error}"] += 1
                continue
            if draft.outcome in ("migrated", "with losses"):
                check(path, Path(folder) / f"config_{number}.py")
            counts[kind(draft)][draft.outcome] += 1
            for item in {*draft.not_yet, *draft.refused, *draft.lost}:
                reasons[f"{draft.outcome}: {item.what}: {item.why}"] += 1
    print(table(counts))
    if options.reasons:
        print("\n".join(f"{count:4} {reason}" for reason, count in reasons.most_common()))


def paths(folder: Path) -> list[Path]:
    """All files that may be configs, sorted."""
    found = (path for path in folder.rglob("*") if path.suffix in (".py", ".yaml", ".yml"))
    return sorted(path for path in found if not path.name.startswith(("__init__", "convert_")))


def check(path: Path, new: Path) -> None:
    """Write the migrated file and load it: every migrated value must be read back."""
    done = file.migrate(path, new)
    loaded = load_settings(done.path).settings
    for name, value in done.draft.values.items():
        given = getattr(loaded, name)
        if plain(given) != plain(value):
            raise SystemExit(f"{path}: {name} is {given!r} in the file, expected {value!r}")


def compare_built_in(folder: Path) -> None:
    """Print the settings in which built-ins differ from the old files of the same names."""
    defaults = {n: f.default for n, f in Settings.model_fields.items() if not f.is_required()}
    counts: Counter[str] = Counter()
    for path in paths(folder):
        name, values = path.stem, {}
        if name in catalog_xtuner0.missing():
            counts["not composed, with a reason"] += 1
            continue
        with contextlib.suppress(ConfigError):
            values = file.read(path).values
        if not values:
            continue
        built_in = catalog_xtuner0.compose(name)
        if built_in is None:
            counts["unknown"] += 1
            print(f"{name}: is no built-in name")
            continue
        full = built_in["tuning"] == "full"
        differing = {
            key: (values.get(key, defaults.get(key)), built_in.get(key, defaults.get(key)))
            for key in sorted({*values, *built_in} - {*WORDED_ANEW, *(ADAPTER if full else ())})
        }
        differing = {k: pair for k, pair in differing.items() if plain(pair[0]) != plain(pair[1])}
        counts["composed, differing" if differing else "composed, equal"] += 1
        for key, (old, new) in differing.items():
            print(f"{name}: {key} is {new!r}, and {old!r} in the file")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))


def plain(value: object) -> object:
    """A list instead of a tuple; both are equivalent."""
    return list(value) if isinstance(value, tuple) else value


def kind(draft: Draft) -> str:
    """What a config trains, for a row of the table."""
    shared = draft.values.get("sequence_parallel_size", 1) != 1
    return f"{draft.kind or 'other'}{', sequence parallel' if shared else ''}"


def table(counts: dict[str, Counter[str]]) -> str:
    """The counts as a table of Markdown."""
    lines = [f"| kind | files | {' | '.join(OUTCOMES)} |", f"|---|--:|{'--:|' * len(OUTCOMES)}"]
    total: Counter[str] = Counter()
    for name in sorted(counts, key=lambda name: (-counts[name].total(), name)):
        total += counts[name]
        lines.append(row(name, counts[name]))
    return "\n".join([*lines, row("all", total)])


def row(name: str, counted: Counter[str]) -> str:
    """One line of the table."""
    numbers = " | ".join(str(counted[outcome]) for outcome in OUTCOMES)
    return f"| {name} | {counted.total()} | {numbers} |"


if __name__ == "__main__":
    main()
