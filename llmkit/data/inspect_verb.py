"""The verb `llmkit inspect`: batches of a recipe, of a command's trainer or of a data set, shown row by row.

Owns where the batches come from, and what is printed and written.   code = main(settings, get_subject, command)

The rows are what the trainer's own loader, sampler and collator yield at that step; nothing is made anew here. Only for
`--dataset`, where there is no trainer, they are made as TRL's SFT would (`check/audit.py`).
"""

import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..check.command import call_in_command, write_found
from ..check.subject import NotApplicable, NotRun
from ..config import UserError
from ..verbs import InspectConfig
from .inspect import COUNTED_ROWS, Inspection, describe

CALL = "llmkit.data.inspect_verb:inspect_found"
PAIRED = re.compile(r"(DPO|Reward|CPO|ORPO)Trainer")  # TRL's: chosen and rejected are two halves of a batch
TO_STDERR = 2  # where the command's own output goes


def main(
    settings: InspectConfig, get_subject: Callable[[], Any] | None = None, command: list[str] | None = None
) -> int:
    """Shows what a recipe (by its subject), a command or a data set trains on: 0. Raises UserError."""
    _check_settings(settings, is_alone=get_subject is None and command is None)
    if command is not None:
        wanted = {key: getattr(settings, key) for key in ("num_rows", "step", "redact")}
        inspection = Inspection.from_dict(call_in_command(CALL, wanted, command, "inspect", stdout=TO_STDERR))
    elif get_subject is not None:
        subject = get_subject()
        given = (settings.num_rows, settings.step, settings.redact)
        inspection = of_training(subject.training, subject.tokenizer, subject.target, *given)
    else:
        inspection = _of_dataset(settings)
    show(inspection.redacted() if settings.redact else inspection, settings)
    return 0


def _check_settings(settings: InspectConfig, is_alone: bool) -> None:
    """Before anything is built. `is_alone`: neither a recipe nor a command."""
    from ..check.verb import check_file

    names = [name for name in ("tokenizer_name", "dataset", "max_length") if getattr(settings, name) is not None]
    if names and not is_alone:
        raise UserError(f"--{names[0]} stands alone: a recipe or command has its own; leave it out")
    if is_alone and not {"tokenizer_name", "dataset"} <= set(names):
        raise UserError(
            "nothing to inspect: give a recipe, a command after `--`, or --tokenizer_name and --dataset; "
            "`llmkit help inspect` says more"
        )
    if settings.step and is_alone:
        raise UserError("--step is not used with --dataset, which has no steps; leave it out")
    if settings.num_rows < 1:
        raise UserError(f"num_rows={settings.num_rows}; allowed: 1 or more")
    if settings.step < 0:
        raise UserError(f"step={settings.step}; allowed: 0 or more")
    for key in ("json", "html"):
        if value := getattr(settings, key):
            check_file(key, Path(value))


def of_training(
    training: Any, tokenizer: Any, target: str, num_rows: int, step: int, redact: bool = False,
    is_paired: bool | None = None, tokenize_prompts: Any = None,
) -> Inspection:  # fmt: skip
    """Of anything that has `settings` and `batches_from(step)`: our recipes, and `HFTraining` for any Trainer."""
    batches = _told(training.batches_from(step), redact)
    return describe(batches, tokenizer, num_rows, training.settings, is_paired, tokenize_prompts, target, step)


def _told(batches: Iterator[Any], redact: bool) -> Iterator[Any]:
    """What stops the user's own loader is theirs to mend, in a line; its message may quote a row."""
    try:
        yield from batches
    except UserError:
        raise
    except (NotApplicable, NotRun) as error:
        raise UserError(str(error).replace("run the check with one", "inspect with one")) from None
    except Exception as error:
        raise UserError(f"the trainer's own loader raised {_named(error, redact)}; train() would, too") from error


def _named(error: Exception, redact: bool) -> str:
    message = "" if redact else str(error).strip().split("\n")[0][:300]
    return ": ".join(filter(None, [type(error).__name__, message]))


def _of_dataset(settings: InspectConfig) -> Inspection:
    from ..check.attach import from_folder
    from ..check.audit import label_rows_counted
    from ..verbs import CheckConfig

    given = CheckConfig(
        tokenizer_name=settings.tokenizer_name, dataset=settings.dataset, max_length=settings.max_length
    )
    subject = from_folder(given)
    found, broken = label_rows_counted(subject, max(settings.num_rows, COUNTED_ROWS))
    why = broken[0][1] if broken else ""  # the kind of an error, and its message, which may quote the row
    why = why.split(":")[0] if settings.redact else why
    if not found:
        raise UserError(f"dataset={settings.dataset!r}: no row can be tokenised (row {broken[0][0]}: {why})")
    batches = (
        {"input_ids": [row.input_ids], "labels": [row.labels], "attention_mask": [[1] * len(row.labels)]}
        for row in found
    )
    target = f"{settings.dataset} as TRL's SFT would make it"
    target += f" ({len(broken):,} rows left out: {why})" if broken else ""
    return describe(batches, subject.tokenizer, settings.num_rows, subject.settings, target=target)


def show(inspection: Inspection, settings: InspectConfig) -> None:
    """Prints the rows and writes what was asked for."""
    from ..check.verb import make_console
    from ..run import write_json, write_text
    from .inspect_console import print_inspection
    from .inspect_page import page

    if settings.json:
        write_json(Path(settings.json), inspection.to_dict())
    if settings.html:
        write_text(Path(settings.html), page(inspection))
    print_inspection(inspection, make_console())
    for key in ("json", "html"):
        if value := getattr(settings, key):
            print(f"{key}: {value}")


# in the child of a command


def inspect_found(
    wanted: dict[str, Any], given: dict[str, Any], trainer: Any = None, failure: str | None = None
) -> None:
    """Called by the hook with the trainer at `train()`, or with what its constructor raised."""
    from ..check.forward import bare
    from ..check.hf_trainer import HFTraining

    out = Path(wanted["out"])
    try:
        if trainer is None:
            failure = str(failure).split(":")[0] if wanted["settings"]["redact"] else failure
            raise UserError(f"{failure}; there are no batches to show; mend that first (above)")
        tokenizer = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        if tokenizer is None:
            raise UserError("the trainer has no tokenizer to show tokens with; give it processing_class=tokenizer")
        name = type(trainer).__name__
        is_paired = any(PAIRED.search(c.__name__) for c in type(trainer).__mro__) or None
        tokenize = getattr(trainer, "_tokenize_prompts", None)  # TRL's reinforcement trainers
        inspection = of_training(
            HFTraining(trainer), tokenizer, f"{name} of {type(bare(trainer.model)).__name__}",
            **wanted["settings"], is_paired=is_paired, tokenize_prompts=tokenize and (lambda p: tokenize(p)[0]),
        )  # fmt: skip
        write_found(out, inspection.to_dict())
    except UserError as error:
        write_found(out, {"error": str(error)})
    except Exception as error:
        redact = wanted["settings"]["redact"]
        if not redact:
            traceback.print_exc()
        write_found(out, {"error": f"inspecting the trainer failed with {_named(error, redact)}"})
