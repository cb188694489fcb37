"""Every command with what it needs, so that tests can walk over all commands and options."""

import shutil
from pathlib import Path

import torch
import typer

from safer_ray.cli import app as cli

GROUP = typer.main.get_command(cli.app)
OPTIONS = [(name, parameter) for name, command in sorted(GROUP.commands.items()) for parameter in command.params]


def numeric(parameter):
    """Whether an option takes a number."""
    return parameter.type_descriptor.annotation in (int, float)


def is_path(parameter):
    """Whether an option takes a path."""
    return parameter.type_descriptor.parameter_info.parser is not None


def takes_out(command):
    return any(parameter.name == "out" for parameter in GROUP.commands[command].params)


class Words:
    """The words of every command, which all could be carried out, from the artifacts of a finished run and an audit."""

    def __init__(self, at, config, audit, folder):
        rows = at["corpus"] / "heldout.jsonl"
        torch.save({"x": torch.zeros(2)}, folder / "stage1.pt")
        (folder / "verdicts.jsonl").write_text('{"row_key": "a", "verdict": "bad"}\n')
        (folder / "ratings.json").write_text('{"1": 5}')
        (folder / "texts.txt").write_text("A text.\n")
        self.given = {
            "pairs": at["noise"],
            "codes": at["codes"],
            "reward": at["reward"],
            "sae": at["sae"],
            "start": at["sae"],
            "salience": at["salience"],
            "verdicts": at["verdicts"],
            "contexts": at["contexts"],
            "features": at["select"],
            "auditor": at["auditor"],
            "activations": at["activations"],
            "scores": at["scores"],
            "config": config,
            "text": folder / "texts.txt",
            "ratings": folder / "ratings.json",
            "checkpoint": folder / "stage1.pt",
            "source": rows,
            "audit": audit,
            "a": audit,
            "b": audit,
            "path": rows,
            "root": folder,
            "working_dir": folder,
            "json": folder / "difference.json",
            "strategy": "safer",
            "action": "drop",
            "percent": "5",
            "layer": "1",
            "k": "1",
            "name": "a-name",
            "detector": at["salience"],
        }
        self.own = {
            ("audit", "pairs"): rows,
            ("auditor", "held_out"): at["codes"],
            ("review", "verdicts"): folder / "verdicts.jsonl",
            ("select", "verdicts"): None,  # or ratings
        }
        self.beside = {  # what an option needs or excludes
            ("activations", "pairs"): {},
            ("activations", None): {"pairs"},
            ("select", None): {"verdicts"},
            ("sae", "pairs"): {"reward"},
            ("sae", "reward"): {"pairs"},
            ("auditor", "verdicts"): {"salience"},
            ("auditor", "contexts"): {"salience"},
        }

    def value(self, command, name):
        return self.own.get((command, name)) or self.given[name]

    def of(self, command, name, value, out):
        """The words of a command with `value` for its parameter `name`."""
        words, behind = [command], []
        more = self.beside.get((command, name), self.beside.get((command, None), set()))
        more = set() if name in ("text", "ratings") else more
        for parameter in GROUP.commands[command].params:
            if parameter.name == name:
                given = value
            elif parameter.name == "out":
                given = out
            elif parameter.required or parameter.name in more:
                given = self.value(command, parameter.name)
            elif command == "submit" and parameter.name == "command":
                given = "ls"
            elif command == "submit" and parameter.name == "address":
                given = "http://127.0.0.1:1"
            else:
                continue
            if parameter.param_type_name == "argument":
                behind.append(given)
            else:
                words += [f"{parameter.opts[0]}={given}"]
        return [*words, *(["--"] if behind else []), *behind]


def made_anew(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder
