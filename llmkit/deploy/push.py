"""The verb `push`: a model, its code, tokenizer and card to the Hub; without --dry_run false only what would go.

    llmkit push --model_name_or_path runs/toy/pretrain --hub_model_id ann/toy --license apache-2.0

Owns the order: what goes -> may I write there (the repository, private) -> card and hashes -> one commit -> is it all
there -> public, if asked for. Also `push_to_hub: true` of the training verbs: asked before step 1, done after the last.
Leaves out the Hub's calls (hub.py), the list (files.py), the card (card.py).
"""

import contextlib
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import run as runs
from ..config import UserError
from ..evaluate.columns import manifest_of, run_of
from ..run import Result
from ..verbs import PushConfig
from . import card, facts, files, hub, licence
from .files import Item

CARD = "README.md"
REPORT = "push.json"  # not result.json: a push is no stage of a model, and `llmkit report` shows those
MESSAGE = "Upload with llmkit push"
Say = Callable[[str], object]


def main(config: PushConfig) -> Result:
    """Lists, writes the card, and sends where it is asked to. Raises UserError; what failed is taken back."""
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    say: Say = lambda line: console.print(line, markup=False)  # noqa: E731
    hub.check_id(config.hub_model_id)
    folder, kind = files.find_kind(config.model_name_or_path)
    out, repo = Path(config.output_dir).expanduser(), config.hub_model_id
    run = run_of(folder)
    if run and manifest_of(run).get("overfit"):
        raise UserError(f"{run}: is a run of overfit, which tests the pipeline and is never pushed; name another")
    parent, terms = _terms(config, folder, kind, run, say)
    items, variants = _items(config, folder, kind, parent, say)
    with contextlib.nullcontext() if config.dry_run else hub.session(say):
        state = None if config.dry_run else hub.access(repo)  # before anything long
        if state is not None:
            _check_room(state, config)
        chain = [run, *parent.folders] if run else []
        names = sorted(item.path for item in items)
        known = facts.gather(repo, folder, kind, chain, parent, terms, config, variants, names)
        items.append(_card(known, out, say))
        _list(items, say)
        note = {"license": terms, "kind": kind}
        sha = _send(config, state, items, run or out, note, say) if state is not None else None
    if state is None:
        say(f"dry run   nothing was sent; its card: {out / CARD}; --dry_run false sends it")
    metrics: dict[str, Any] = {"num_files": len(items), "num_bytes": sum(item.size for item in items)}
    metrics |= {"hub_model_id": repo, "commit": sha, "is_dry_run": config.dry_run}
    wall_s = time.perf_counter() - started
    result = Result("push", "ok", str(folder), str(run) if run else None, wall_s, 0.0, 0, {}, metrics)
    told = [{"path": item.path, "num_bytes": item.size} for item in items]
    runs.write_json(out / REPORT, vars(result) | {"files": told})
    return result


def _card(known: facts.Known, out: Path, say: Say) -> Item:
    text = card.write(known)
    card.validate(text)
    if not known.evaluation:
        say(f"WARNING   the card quotes no evaluation: {known.no_evaluation}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={str(out)!r}: cannot be written ({error.strerror}); choose another") from None
    runs.write_text(out / CARD, text)
    return Item(CARD, None, text.encode())


def _terms(config: PushConfig, folder: Path, kind: str, run: Path | None, say: Say) -> tuple[licence.Parent, str]:
    """Parent and licence. Raises UserError where either cannot be told."""
    above, began = licence.ancestors(run)
    if kind == "adapter":
        recorded = _recorded_base(folder)
        began = recorded if recorded and not files.is_local(recorded) else began
    parent = licence.find_parent(above, began, config.base_model)
    if kind == "adapter" and not config.base_model and not parent.is_direct:
        parent = licence.Parent(None, parent.folders)  # an adapter fits the very base that it was trained on
    found, whence, warning = licence.find_licence(config.license, parent, run or folder)
    if found == "other" and not config.license_name:
        raise UserError(f"license=other ({whence}): the Hub asks what it is called: --license_name NAME")
    for key in ("license_name", "license_link"):
        if getattr(config, key) and found != "other":
            raise UserError(f"{key}={getattr(config, key)!r} has no effect with license={found}; remove it")
    say(f"push      {config.model_name_or_path} -> {config.hub_model_id}")
    say(f"licence   {found} ({whence})")
    if warning:
        say(f"WARNING   {warning}")
    say(f"parent    {parent.hub_id or 'none on the Hub that is known; --base_model names one'}")
    return parent, found


def _recorded_base(folder: Path) -> str:
    from ..align.lora import recorded_base

    return recorded_base(folder)


def _base_of(variant: Path, folder: Path, config: PushConfig) -> str | None:
    """Where the model that a variant was made of is on the Hub: mostly this very repository. None: not known."""
    above, began = licence.ancestors(run_of(variant))
    named = [Path(_recorded_base(variant))] if (variant / "adapter_config.json").is_file() else []
    if folder.resolve() in [place.resolve() for a in named + above[:1] for place in (a, a / "model")]:
        return config.hub_model_id
    parent = licence.find_parent(above, began, None)
    return parent.hub_id if parent.is_direct else None


def _items(
    config: PushConfig, folder: Path, kind: str, parent: licence.Parent, say: Say
) -> tuple[list[Item], list[tuple[str, str]]]:
    """What goes, without the card, and the variants' (name, kind). What stays is said."""
    items, left_out = files.collect(folder, kind)
    items, said = files.without_local_paths(items, parent.hub_id)
    variants: list[tuple[str, str]] = []
    for name in config.variants:
        place, of = files.find_kind(str(name), "variants")
        label = place.parent.name if place.name in ("model", "adapter") else place.name
        if label in [n for n, _ in variants]:
            raise UserError(f"variants: two of them would be called {label!r}; rename one of the folders")
        more, stays = files.collect(place, of, label)
        root = {item.path for item in items}
        if code := [item.path for item in more if item.path.endswith(".py") and Path(item.path).name not in root]:
            raise UserError(f"variants: {code[0]}: code is loaded from the first folder only; push {label!r} by itself")
        more, changes = files.without_local_paths(more, _base_of(place, folder, config))
        items, said = items + more, said + changes
        left_out += [f"{label}/{path}" for path in stays]
        variants.append((label, of))
    files.check_private(items)
    for line in said:
        say(f"changed   {line}")
    if folder.name in ("model", "adapter") and (around := run_of(folder)) and around != folder:
        left_out += [p.name + "/" * p.is_dir() for p in sorted(around.iterdir()) if p != folder and p.name[0] != "."]
    if left_out:
        shown = ", ".join(left_out[:8]) + (f" and {len(left_out) - 8} more" if len(left_out) > 8 else "")
        say(f"stays     {len(left_out)} that are not on the list: {shown}")
    return items, variants


def _list(items: list[Item], say: Say) -> None:
    for n, item in enumerate(sorted(items, key=lambda item: item.path)):
        made = "" if item.content is None else "  (made here)" if item.path == CARD else "  (changed)"
        say(f"{'goes' if not n else '':<9} {item.path:<40} {item.size:>14,}{made}")
    say(f"total     {len(items)} files, {sum(item.size for item in items):,} bytes")


# ---- sending


def _check_room(state: hub.State, config: PushConfig) -> None:
    """Raises UserError where a private push would be public at once."""
    if not state.is_private and config.hub_private_repo:
        raise UserError(
            f"{state.repo_id} is there and public, and hub_private_repo=true; make it private on the Hub, or add "
            "--hub_private_repo false"
        )


def _send(config: PushConfig, state: hub.State, items: list[Item], place: Path, note: dict[str, Any], say: Say) -> str:
    """One commit, looked at afterwards; a fresh repository becomes public at the very end. Returns the commit's id."""
    repo, record = state.repo_id, licence.published(place).get(state.repo_id, {})
    is_fresh = state.is_new or not state.files or record.get("finished") is False
    paths = {item.path for item in items}
    may_be_same = paths == set(state.files) and all(state.files[i.path].size == i.size for i in items)
    if not is_fresh and not config.update and not may_be_same:
        raise _taken(state)
    hashes = {item.path: (item.size, *item.hashes()) for item in items}
    is_same = may_be_same and not hub.differing(state.files, hashes)
    if not is_fresh and not config.update and not is_same:
        raise _taken(state)
    mine = {str(path) for path in record.get("files") or []}
    gone = sorted(mine & set(state.files) - paths)
    strange = sorted(set(state.files) - paths - set(gone))
    for what, names in (("deleted", gone), ("untouched", strange)):
        if names:
            say(f"{what:<9} {len(names)} that this push does not hold: {', '.join(names[:8])}")
    note = note | {"files": sorted(paths), "is_private": state.is_private}
    if not is_same:
        _record(place, repo, note | {"finished": not is_fresh, "commit": state.sha})
    sha = state.sha if is_same and not gone else hub.commit(state, items, gone, MESSAGE)
    _verify(state, hashes, str(sha), is_fresh)
    say(f"there     {len(items)} files, sizes and hashes as here{' already' if is_same and not gone else ''}")
    if is_fresh and state.is_private and not config.hub_private_repo:
        hub.publish(repo)
        note["is_private"] = False
    elif state.is_private and not config.hub_private_repo:
        say(f"WARNING   {repo} was private before and stays so; its settings on the Hub change that")
    _record(place, repo, note | {"finished": True, "commit": sha})
    say(f"pushed    {repo}, {'private' if note['is_private'] else 'public'}, commit {str(sha)[:12]}")
    return str(sha)


def _taken(state: hub.State, way: str = "replace what is in it: --update true") -> UserError:
    held = ", ".join(sorted(state.files)[:3])
    return UserError(
        f"hub_model_id={state.repo_id!r} is taken: it holds {len(state.files)} files ({held}, ...); choose another "
        f"name, or {way}"
    )


def _verify(state: hub.State, hashes: dict[str, tuple[int, str, str]], sha: str, is_fresh: bool) -> None:
    """Raises UserError where the Hub holds something else than this disk did; that is taken back there."""
    there = hub.tree(state.repo_id, sha)
    bad = hub.differing(there, hashes)
    if not bad:
        return
    taken_back = "all that was sent was deleted again" if is_fresh else "what was there before is back"
    try:
        if is_fresh and (doomed := sorted(set(there) & set(hashes))):
            hub.remove(state.repo_id, doomed, "Delete what did not arrive as it was sent")
        elif not is_fresh:
            hub.restore(state, there, "Put back what was there before")
    except UserError as error:
        taken_back = f"and it could not be taken back ({error})"
        taken_back += f"; what was there before still loads with revision={state.sha[:12]}" if state.sha else ""
    raise UserError(
        f"{state.repo_id}: {bad[0]} did not arrive as it lies here (size or hash; {len(bad)} of {len(hashes)} files), "
        f"{taken_back}; run the same command again"
    )


def _record(place: Path, repo: str, entry: dict[str, Any]) -> None:
    """What of a run folder is on the Hub; its later stages name it as their parent, and a cut push goes on."""
    place.mkdir(parents=True, exist_ok=True)
    others = {name: value for name, value in licence.published(place).items() if name != repo}
    runs.write_json(place / licence.PUBLISHED, others | {repo: entry})


# ---- push_to_hub of the training verbs


def check_access(settings: Any) -> None:
    """Before step 1: is the licence known, may I write, is the name free? Raises UserError."""
    hub.check_id(settings.hub_model_id or "")
    if getattr(settings, "overfit", None):
        raise UserError(
            "push_to_hub=true and overfit: that run tests the pipeline and is never pushed; remove one of them"
        )
    began = settings.model_name_or_path
    first = Path(runs.resolve_model_dir(began)) if began else None
    start = (run_of(first) or first) if first and first.is_dir() else None
    above, root = licence.ancestors(start)
    parent = licence.find_parent([start, *above] if start else [], root if start else began, None)
    found, whence, warning = licence.find_licence(settings.license, parent, None)
    if found == "other":
        raise UserError(
            f"license=other ({whence}): the Hub asks for its name, which `llmkit push --license_name NAME` takes; "
            "push after the run"
        )
    with hub.session(print):
        state = hub.access(settings.hub_model_id)
    if state.files:
        raise _taken(state, "push after the run: llmkit push --update true")
    if not state.is_private and settings.hub_private_repo:
        _check_room(state, PushConfig(hub_private_repo=True))
    seen = "private" if state.is_private else "public"
    print(
        f"push      {state.repo_id} is ready ({seen}, {found} {whence}); the model goes there after the run", flush=True
    )
    if warning:
        print(f"WARNING   {warning}", flush=True)


def after(settings: Any) -> None:
    """Pushes what a training verb left, if it came to its end; else says that it was not. Raises UserError."""
    folder = Path(settings.output_dir)
    status = runs.run_status(folder)
    words = ["llmkit", "push", "--model_name_or_path", str(folder), "--hub_model_id", settings.hub_model_id]
    words += ["--license", settings.license] if settings.license else []
    words += ["--dry_run", "false"] + ([] if settings.hub_private_repo else ["--hub_private_repo", "false"])
    again = shlex.join(words)
    if status != "ok":
        print(f"push      not done: the run is {status or 'unfinished'}; once it has ended: {again}", flush=True)
        return
    try:
        main(
            PushConfig(
                model_name_or_path=str(folder),
                hub_model_id=settings.hub_model_id,
                hub_private_repo=settings.hub_private_repo,
                license=settings.license,
                output_dir=str(folder / "push"),
                dry_run=False,
            )
        )
    except UserError as error:
        raise UserError(f"the run is kept in {folder}, but was not pushed: {error}; again: {again}") from None
