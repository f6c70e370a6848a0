"""What of a folder is published: an allow-list, and nothing in it that belongs to this machine.

    folder, kind = find_kind("runs/toy/sft");  items, left_out = collect(folder, kind)
    items = without_local_paths(items, base_model);  check_private(items)

Owns which files go under which name, which are rewritten, and that none holds a path of this machine or a token.
Leaves out the card (card.py) and sending (hub.py).
"""

import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import UserError
from ..run import resolve_model_dir

TOKENIZER = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt "
    "tokenizer.model spiece.model chat_template.jinja chat_template.json additional_chat_templates/*.jinja"
).split()
ALLOWED = {  # kind -> what may go; code only where a config names it
    "model": ["config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json",
              *TOKENIZER],
    "adapter": [
        "adapter_config.json", "adapter_model.safetensors", "base_quantization.json", "generation_config.json",
        *TOKENIZER,
    ],
    "gguf": ["[!.]*.gguf", "Modelfile"],
}  # fmt: skip
TEXT = (".json", ".jinja", ".py", ".txt", ".md")
VOCABULARY = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")  # any text may be a token there
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
HOMES = re.compile(
    r"(?:\bfile://|(?<![\w./-]))/(?:home|Users|root|tmp|mnt|workspace|scratch)/[\w.-]+"
    r"|\b[A-Za-z]:\\+Users\\+[\w.-]+"
)
ABSOLUTE = re.compile(r"~?(?:/[^/\s]+){2,}/?|[A-Za-z]:[\\/].+")  # as the whole value of a config's key


@dataclasses.dataclass(frozen=True)
class Item:
    """A file of the repository: on this disk, or `content` that was made for it."""

    path: str  # in the repository
    source: Path | None = None
    content: bytes | None = None

    def read(self) -> bytes:
        if self.content is not None:
            return self.content
        assert self.source is not None, f"{self.path} is neither a file nor made here"
        return self.source.read_bytes()

    @property
    def size(self) -> int:
        return len(self.content) if self.content is not None else self.source.stat().st_size  # type: ignore[union-attr]

    def hashes(self) -> tuple[str, str]:
        """SHA-256, as of large files on the Hub, and git's blob id, as of the others; one pass, flat memory."""
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        for chunk in self._chunks():
            sha256.update(chunk)
            blob.update(chunk)
        return sha256.hexdigest(), blob.hexdigest()

    def _chunks(self) -> Iterator[bytes]:
        if self.source is None or self.content is not None:
            yield self.read()
            return
        with self.source.open("rb") as file:
            yield from iter(lambda: file.read(1 << 22), b"")


def find_kind(name: str, key: str = "model_name_or_path") -> tuple[Path, str]:
    """The folder behind a name and what it holds: model, adapter or gguf. Raises UserError for anything else."""
    folder = Path(resolve_model_dir(str(Path(name).expanduser())))
    if not name or not folder.is_dir():
        raise UserError(f"{key}={name!r}: no such folder; name a run, model, adapter or export folder on this disk")
    for kind, holds in (("model", "config.json"), ("adapter", "adapter_config.json"), ("gguf", "*.gguf")):
        if any(folder.glob(holds)):
            return folder, kind
    raise UserError(f"{key}={name!r}: holds no config.json, adapter_config.json or *.gguf; name a model folder")


def collect(folder: Path, kind: str, into: str = "") -> tuple[list[Item], list[str]]:
    """What goes, by name, and what stays; `into` is a folder of the repository.

    Raises UserError where the folder lacks a part, or holds it as a link to elsewhere.
    """
    wanted = {path for pattern in ALLOWED[kind] for path in folder.glob(pattern) if path.is_file()}
    if kind == "model":
        wanted |= {folder / name for name in _code(folder)}
    for path in sorted(wanted):
        if not path.is_file():
            raise UserError(f"{path}: is missing, and a config names it; put it there")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: is a link that leaves the folder; put the file itself there")
    _check_weights(folder, kind, {path.name for path in wanted})
    every = [path for path in sorted(folder.rglob("*")) if path.is_file() or path.is_symlink()]
    left_out = [str(path.relative_to(folder)) for path in every if path not in wanted]
    prefix = f"{into}/" if into else ""
    return [Item(prefix + path.relative_to(folder).as_posix(), path) for path in sorted(wanted)], left_out


def _code(folder: Path) -> set[str]:
    """The .py files that auto_map names, and those that they import from beside them."""
    todo: list[str] = []
    for name in ("config.json", "tokenizer_config.json"):
        mapped = _json(folder / name).get("auto_map") or {}
        classes = [entry for value in mapped.values() for entry in (value if isinstance(value, list) else [value])]
        todo += [f"{str(c).split('.')[0]}.py" for c in classes if c and "--" not in str(c)]  # REPO--module: elsewhere
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        source = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else ""
        todo += [f"{module}.py" for module in re.findall(r"^\s*from \.(\w+) import", source, flags=re.M)]
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_weights(folder: Path, kind: str, names: set[str]) -> None:
    """Raises UserError where weights are missing, are a pickle, or are cut short."""
    from safetensors import SafetensorError, safe_open

    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if kind != "gguf" and not weights:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
        held = f"{pickles[0]} is a pickle, which is never published" if pickles else "there are no weights"
        raise UserError(f"{folder}: holds no *.safetensors ({held}); save the model with safetensors")
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        missing = sorted(set((_json(folder / index).get("weight_map") or {}).values()) - names)
        if missing:
            raise UserError(f"{folder / index}: names {missing[0]}, which is not there ({len(missing)} files missing)")
    for name in weights:
        try:
            with safe_open(folder / name, framework="np") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / name}: cannot be read ({' '.join(str(error).split())[:100]})") from None


def is_local(name: str, start: Path = Path()) -> bool:
    """A path of this machine rather than a Hub id: what is here, and runs/gone where there is a runs/."""
    if not name or not HUB_ID.fullmatch(name):
        return bool(name)
    path = start / name
    return path.exists() or ("/" in name and path.parent.is_dir())


def _object(item: Item) -> dict[str, Any]:
    try:
        found = json.loads(item.read())
    except ValueError as error:
        raise UserError(f"{item.path}: is no JSON ({error}); write it anew") from None
    if not isinstance(found, dict):
        raise UserError(f"{item.path}: holds a {type(found).__name__}, no JSON object; write it anew")
    return found


def without_local_paths(items: list[Item], base_model: str | None) -> tuple[list[Item], list[str]]:
    """Where a config names its base by a folder of this machine, the Hub id instead; and what was changed.

    Raises UserError for an adapter whose base has none: nobody could load it.
    """
    changed, said = [], []
    for item in items:
        name = Path(item.path).name
        key = {"config.json": "_name_or_path", "adapter_config.json": "base_model_name_or_path"}.get(name, "")
        values = _object(item) if key else {}
        value = values.get(key) or ""
        is_missing = name == "adapter_config.json" and not value
        if not is_missing and not is_local(str(value)):
            changed.append(item)
            continue
        found = f"is a folder of this machine, {value!r}" if value else "names no base"
        if name == "adapter_config.json" and not base_model:
            raise UserError(
                f"{item.path}: {key} {found}; push that model first, or name its Hub id: --base_model NAME/MODEL"
            )
        values = {k: v for k, v in (values | {key: base_model}).items() if k != key or v is not None}
        changed.append(dataclasses.replace(item, content=(json.dumps(values, indent=2) + "\n").encode()))
        said.append(f"{item.path}: {key} is {base_model or 'left out'}, here it {found}")
    return changed, said


# what must stay here


def _machine() -> list[str]:
    places = [Path.home(), Path.cwd(), Path(tempfile.gettempdir())]
    return [str(place) for place in places if len(place.parts) > 1]


def find_private(text: str) -> str | None:
    """The first path of this machine, or something like a Hub token, in a text; None: neither."""
    if TOKEN.search(text):
        return "something like a Hub token"
    if found := HOMES.search(text):
        return f"{found[0]!r}, a path of a machine"
    for place in _machine():
        if found := re.search(rf"(?<![\w./-]){re.escape(place)}(?=$|[/\s\"',:;)\]])", text):
            return f"{found[0]!r}, a path of this machine"
    return None


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of all texts in a JSON value, keys written with dots."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _strings(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for n, entry in enumerate(value):
            yield from _strings(entry, f"{key}.{n}")


def _texts(item: Item) -> Iterator[tuple[str, str]]:
    """(where, text) of all that could tell something: of weights what their header says."""
    name = Path(item.path).name
    if name.endswith(".safetensors") and item.source:
        from safetensors import safe_open

        with safe_open(item.source, framework="np") as file:
            yield from _strings(file.metadata() or {})
    elif name.endswith(".json"):
        values = {} if name in VOCABULARY else _object(item)
        if name == "tokenizer.json":
            values = {key: value for key, value in values.items() if key not in ("model", "added_tokens")}
        yield from _strings(values)
    elif (name.endswith(TEXT) or name == "Modelfile") and name not in VOCABULARY:
        for n, line in enumerate(item.read().decode("utf-8", "replace").splitlines(), 1):
            yield f"line {n}", line


def check_private(items: list[Item]) -> None:
    """Raises UserError naming file and key where something of this machine would go out."""
    for item in items:
        is_config = item.path.endswith((".json", ".safetensors"))
        for where, text in _texts(item):
            found = find_private(text)
            if not found and is_config and ABSOLUTE.fullmatch(text):
                found = f"{text!r}, a path of a machine"
            if found:
                raise UserError(f"{item.path}: {where} holds {found}; remove it before it is published")
        if item.path.endswith(".gguf") and item.source:  # names come first; a vocabulary may hold any short text
            with item.source.open("rb") as file:
                head = file.read(1 << 16)
            for place in (p for p in _machine() if len(Path(p).parts) > 2):
                if place.encode() + b"/" in head:
                    raise UserError(f"{item.path}: its header holds {place!r}, a path of this machine; export it anew")
