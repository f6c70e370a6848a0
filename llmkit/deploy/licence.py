"""Under which licence a model may go out, and which model of the Hub it came from.

    parent = find_parent(run, base_model);  licence = find_licence(None, parent, is_offline=True)

Owns both questions, answered from folders on this disk and, where it is in reach, from the Hub. Nothing is guessed.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import yaml

from ..config import UserError
from ..evaluate.columns import lineage, manifest_of, started_in
from .files import HUB_ID, is_local

PUBLISHED = "published.json"  # in a run folder: repository -> what went there
LICENCES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma
    other""".split()
)  # the Hub's list, less `unknown`


@dataclasses.dataclass(frozen=True)
class Parent:
    """`hub_id` None: trained from scratch, or from a folder that was never published; `folders`: nearest first."""

    hub_id: str | None
    folders: list[Path]
    is_direct: bool = True  # the very weights that training began with, not those of an earlier stage


def published(folder: Path) -> dict[str, dict[str, Any]]:
    """repository -> record of all pushes of a run folder; empty where there was none."""
    try:
        found = json.loads((folder / PUBLISHED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


def find_parent(folders: list[Path], began: str | None, base_model: str | None) -> Parent:
    """Of a model whose ancestors lie in `folders`, nearest first; `began`: what the first of all runs began with."""
    if base_model and not HUB_ID.fullmatch(base_model):
        raise UserError(f"base_model={base_model!r}; allowed: a Hub id, e.g. ann/toy-pretrain")
    if base_model:
        return Parent(base_model, folders)
    for n, folder in enumerate(folders):
        records = published(folder).items()
        ids = [repo for repo, record in records if record.get("finished") and record.get("kind", "model") == "model"]
        if ids:
            return Parent(ids[-1], folders, is_direct=n == 0)
    is_id = bool(began) and not is_local(str(began))
    return Parent(began if is_id else None, folders, is_direct=not folders)


def ancestors(run: Path | None) -> tuple[list[Path], str | None]:
    """The folders that a run came from, nearest first, and the Hub id or folder that the first of them began with."""
    chain = lineage(run) if run else []
    began = manifest_of(chain[-1]).get("parent") if chain else None
    if began and is_local(began, start := started_in(chain[-1])):
        began = str((start / began).absolute())  # told apart from a Hub id wherever this is asked
    return chain[1:], began


def front_matter(folder: Path) -> dict[str, Any]:
    """Of the README.md in a folder; empty where it has none."""
    try:
        found = re.match(r"---\n(.*?)\n---", (folder / "README.md").read_text(encoding="utf-8"), flags=re.S)
        values = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _stated(folder: Path) -> str | None:
    """The licence that a folder states: by its card, or since it was published under it."""
    for place in (folder, folder / "model"):
        if isinstance(found := front_matter(place).get("license"), str):
            return found
    records = [record.get("license") for record in published(folder).values()]
    return next((str(found) for found in reversed(records) if found), None)


def _on_the_hub(hub_id: str) -> str | None:
    """None where the Hub says nothing, or is not in reach."""
    from . import hub

    info = hub.model_info(hub_id)
    found = getattr(getattr(info, "card_data", None), "license", None)
    tags = [tag.removeprefix("license:") for tag in getattr(info, "tags", None) or [] if tag.startswith("license:")]
    return found if isinstance(found, str) else next(iter(tags), None)


def find_licence(given: str | None, parent: Parent, own: Path | None) -> tuple[str, str, str | None]:
    """The licence, where it is from, and a warning where the parent states another one.

    Raises UserError for one that the Hub does not know, and where there is none to be found.
    """
    if given and given not in LICENCES:
        raise UserError(
            f"license={given!r}; allowed: an identifier of the Hub, e.g. apache-2.0, mit, cc-by-4.0, llama3.1, or other"
        )
    stated, whence = None, ""
    for folder in parent.folders:
        if stated := _stated(folder):
            whence = f"from {folder.name}"
            break
    if not stated and parent.hub_id and (stated := _on_the_hub(parent.hub_id)):
        whence = f"from {parent.hub_id}"
    if given:
        warning = (
            f"license={given}, but the parent is under {stated} ({whence})" if stated not in (None, given) else None
        )
        return given, "given", warning
    if not stated and own and (stated := _stated(own)):
        whence = "from its earlier card"
    if not stated or stated not in LICENCES:
        found = f"its parent states {stated!r}" if stated else "neither the run nor its parents state one"
        if not stated and parent.hub_id:
            found = f"{parent.hub_id} states none, or the Hub is not in reach"
        raise UserError(f"license is unknown ({found}); name one, e.g. --license apache-2.0")
    return stated, whence, None
