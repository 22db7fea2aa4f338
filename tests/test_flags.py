"""The flags of all commands: what their help says, what they refuse, and their table in README.md."""

import re

import pytest
from absl.flags import FlagValues
from conftest import ROOT

from vitfn import (
    attention,
    bench,
    compare,
    convert,
    evaluate,
    export,
    flags,
    flagtypes,
    inspect,
    predict,
    recipe,
    train,
)
from vitfn.device import DEVICES

GROUPS = {
    "train": flags.TRAIN,
    "evaluate": (flags.evaluate_flags, flags.data_flags, flags.crop_flags, flags.device_flags),
    "predict": (flags.predict_flags, flags.labels_flags, flags.crop_flags, flags.device_flags),
    "attention": (flags.attention_flags, flags.labels_flags, flags.crop_flags),
    "convert": (flags.convert_flags, flags.assume_flags),
    "inspect": (flags.assume_flags,),
    "compare": (flags.compare_flags,),
    "export": (flags.export_flags,),
    "bench": (*flags.TRAIN, flags.bench_flags),
}
COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "attention": attention,
    "convert": convert,
    "inspect": inspect,
    "compare": compare,
    "export": export,
    "bench": bench,
}
EVERY = [(name, group) for name, groups in GROUPS.items() for group in groups]
UNITS = (
    r"pixels|seconds|updates|images per|checkpoints to|processes|channels|parts|part of|fraction|factor|probability|"
    r"number of|0 to 1|between 0 and 1|above 0|below 1|0 or more|any integer|operations an image|0: write no head"
)


def defined(group) -> FlagValues:
    group(fv := FlagValues())
    return fv


@pytest.mark.parametrize("command", GROUPS)
def test_the_groups_here_are_those_of_the_command(command, capsys):
    """So that the tests below miss no flag."""
    assert COMMANDS[command].main([command, "--help"]) == 0
    shown = set(re.findall(r"^\s+(?:-h,)?--(?:\[no\])?(\w+):", capsys.readouterr().out, re.M)) - {"help", "flagfile"}
    assert shown == {name for group in GROUPS[command] for name in defined(group)}


@pytest.mark.parametrize(("command", "group"), EVERY)
def test_every_flag_says_what_it_is(command, group):
    fv = defined(group)
    for name in fv:
        assert re.search(r"[a-z]{2}.*\.$", fv[name].help), f"--{name}: {fv[name].help}"


@pytest.mark.parametrize(("command", "group"), EVERY)
def test_every_number_says_its_unit_or_range(command, group):
    fv = defined(group)
    for name in fv:
        if "string" not in fv[name].flag_type() and fv[name].flag_type() != "bool":
            assert re.search(UNITS, fv[name].help, re.I), f"--{name}: {fv[name].help}"


@pytest.mark.parametrize(("command", "group"), EVERY)
def test_an_empty_default_is_explained(command, group):
    fv = defined(group)
    for name in set(fv) - {"name"}:  # which has to be given
        if fv[name].default in (None, ""):
            assert re.search(r"default: |empty: |as in ", fv[name].help), f"--{name}: {fv[name].help}"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_is_without_bounds(value):
    for _, group in EVERY:
        fv = defined(group)
        for name in fv:
            if fv[name].flag_type() == "float":
                with pytest.raises(Exception, match=rf"--{name}={value}: expected a finite number"):
                    fv(["command", f"--{name}={value}"])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--nohelp=3", "--help=perhaps", "--no_such_flag", "--flagfile=absent"])
def test_what_cannot_be_parsed_is_one_line(command, flag, capsys):
    assert COMMANDS[command].main([command, flag]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vitfn: ")
    assert err.count("\n") == 1
    assert flag.partition("=")[0].lstrip("-").removeprefix("no") in err


def test_the_table_in_the_readme_is_that_of_train():
    text = (ROOT / "README.md").read_text()
    shown = text.partition("<!-- flags -->\n")[2].partition("\n<!-- /flags -->")[0]
    assert shown == flags.table(flags.TRAIN), "python -m vitfn.flags prints the table"


def test_the_table_has_every_flag_and_escapes_what_markdown_would_eat():
    def group(fv):
        define = flagtypes.Definitions(fv)
        define.string("a", "x", "Of <name>, `b|c` and *.")
        define.bool("b", True, "Yes.")
        define.float("c", None, "None.")
        define.string("d", "", "Empty.")

    assert flags.table([group]).splitlines() == [
        "| flag | default | meaning |",
        "|---|---|---|",
        r"| `--a` | `x` | Of \<name\>, \`b\|c\` and \*. |",
        "| `--b` | `true` | Yes. |",
        "| `--c` |  | None. |",
        "| `--d` |  | Empty. |",
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "flags").iterdir()), ids=lambda path: path.name)
def test_a_flagfile_is_one_the_command_takes_and_says_what_to_expect(path):
    fv = FlagValues()
    for group in flags.TRAIN:
        group(fv)
    fv(["train", *(line for line in path.read_text().splitlines() if line.startswith("--"))])
    recipe.check(fv, DEVICES["cpu"])
    assert recipe.optimizer(fv, recipe.model(fv, None)).rules.frozen == ""
    for part in ("Command:", "Needs:", "Time:", "Result:"):
        assert re.search(rf"^# {part} +\S", path.read_text(), re.M), part
    assert f"`flags/{path.name}`" in (ROOT / "README.md").read_text()
