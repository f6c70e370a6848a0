"""The few calls to the Hub: who am I, may I write, one commit, is it all there; every failure is one line.

    with session(print):
        state = access("ann/toy"); sha = commit(state, items, [], "..."); bad = differing(tree("ann/toy", sha), hashes)

The token comes from HF_TOKEN or `hf auth login` and is never shown. Each call has a time limit; what the Hub cannot do
for the moment (429, 5xx, a cut connection) is asked once more, beside the retries that huggingface_hub makes itself.
Leaves out what goes (files.py) and what a push is (push.py).
"""

import contextlib
import dataclasses
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..config import UserError
from .files import TOKEN, Item

TIMEOUT_S = 60.0  # without a byte in either direction
WAIT_S = 2.0  # before a call is made again
BUSY = (408, 429, 500, 502, 503, 504)
GIT = (".gitattributes",)  # what a new repository holds
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class State:
    """A repository that this user may write to."""

    repo_id: str
    user: str
    is_new: bool  # made by this call
    is_private: bool
    sha: str | None
    files: dict[str, Any]  # path -> RepoFile, without what every repository holds


def hide(text: str) -> str:
    """Without anything like a token, in one line."""
    from huggingface_hub import get_token

    token = get_token()
    text = text.replace(token, "hf_***") if token else text
    return " ".join(TOKEN.sub("hf_***", text).split())


class _Retries(logging.Handler):
    """huggingface_hub says in its log what it asks again; here in one short line, without the address."""

    def __init__(self, say: Callable[[str], object]):
        super().__init__(logging.WARNING)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        if " thrown while requesting " in said:
            self.say(f"hub       {hide(said.split(' thrown while')[0])}; asking again")


@contextlib.contextmanager
def session(say: Callable[[str], object]) -> Iterator[None]:
    """Inside, calls have a time limit, and retries are said by `say`."""
    import huggingface_hub
    from huggingface_hub.utils import _http, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def client() -> Any:
        made = _http.default_client_factory()
        made.timeout = TIMEOUT_S
        return made

    logger, handler = logging.getLogger("huggingface_hub.utils._http"), _Retries(say)
    before, was_propagating, was_quiet = _http._GLOBAL_CLIENT_FACTORY, logger.propagate, are_progress_bars_disabled()
    huggingface_hub.set_client_factory(client)
    logger.addHandler(handler)
    logger.propagate = False
    disable_progress_bars()
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = was_propagating
        huggingface_hub.set_client_factory(before)
        if not was_quiet:
            enable_progress_bars()


def _api() -> Any:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT)


def _status(error: BaseException) -> int | None:
    """Of the server's answer, also inside what huggingface_hub wraps around it."""
    response = getattr(error, "response", None)
    if response is not None:
        return int(response.status_code)
    return _status(error.__cause__) if error.__cause__ else None


def _is_passing(error: BaseException) -> bool:
    """May be gone when asked again: a busy server, a cut connection; not a time-out, which took long enough."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if _status(error) is not None:
        return _status(error) in BUSY
    network = isinstance(error, HTTPError) or isinstance(error.__cause__, HTTPError)
    return network and not _is_timeout(error) and not isinstance(error, OfflineModeIsEnabled)


def _is_timeout(error: BaseException) -> bool:
    chain = [error, error.__cause__, error.__context__]
    return any("Timeout" in type(each).__name__ for each in chain if each)


def _why(error: BaseException, repo_id: str) -> str:
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 (or TRANSFORMERS_OFFLINE=1) is set, so the Hub may not be asked; unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token; log in with `hf auth login`, or set HF_TOKEN to one that may write"
    status = _status(error)
    said = {
        401: "the token is not valid, or has expired (401); log in again with `hf auth login`, or set HF_TOKEN anew",
        403: f"no write access to {repo_id.split('/')[0]!r} (403); use a token that may write there, or another name",
        404: f"{repo_id} is not there, or the token may not see it (404); check hub_model_id and the token",
        409: f"{repo_id} exists already (409), or is being changed by somebody; run the same command again",
        412: f"somebody else changed {repo_id} meanwhile (412); look at it, then run the same command again",
        413: "the Hub has no room for it, or a file is too large (413)",
        429: "the Hub asks for a pause (429: too many requests); wait a few minutes, then run the same command again",
        507: "the Hub has no room for it (507)",
    }
    if status in said:
        return said[status]
    if status is not None and status >= 500:
        return f"the Hub has a fault of its own ({status}); run the same command again later"
    if status is not None:
        return f"the Hub refused it ({status}): {hide(str(error))[:300]}"
    if _is_timeout(error):
        return f"no answer for {TIMEOUT_S:.0f} s; check the network, then run the same command again"
    cause = error.__cause__ or error
    if isinstance(error, HTTPError) or isinstance(cause, HTTPError):
        return f"the connection was cut ({hide(str(cause)) or type(cause).__name__}); run the same command again"
    return hide(str(error))[:300]


def _ask(doing: str, repo_id: str, call: Callable[[], T]) -> T:
    """Makes the call, and once more where the fault may pass; raises UserError in one line."""
    for is_last in (False, True):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # a dozen types, from httpx to its own
            if _is_passing(error) and not is_last:
                logging.getLogger("huggingface_hub.utils._http").warning(f"{_short(error)} thrown while requesting it")
                time.sleep(WAIT_S)
                continue
            raise UserError(f"{doing} failed: {_why(error, repo_id)}") from None
    raise AssertionError("the second try returns or raises")


def _short(error: BaseException) -> str:
    status = _status(error)
    return f"HTTP Error {status}" if status else "the connection was cut"


def check_id(repo_id: str, key: str = "hub_model_id") -> None:
    """Raises UserError unless it is NAME/MODEL as the Hub allows it."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", repo_id or "") or re.search(
        r"--|\.\.|\.git$|[.-]$", repo_id
    ):
        raise UserError(f"{key}={repo_id!r}; allowed: your name on the Hub and one for the model, e.g. ann/toy-sft")


def model_info(repo_id: str) -> Any:
    """None where the Hub is not in reach, or has no such model."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return None
    try:
        with session(lambda line: None):
            return _api().model_info(repo_id, timeout=10)
    except Exception:  # whatever it is, nothing is known
        return None


def access(repo_id: str) -> State:
    """Makes the repository, private, or finds it. Raises UserError without a token or without write access."""
    api = _api()
    user = _ask("asking the Hub who this is", repo_id, api.whoami)
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UserError("the token may only read; make one that may write, and set HF_TOKEN or run `hf auth login`")

    def create() -> bool:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            api.create_repo(repo_id, private=True, repo_type="model")
            return True
        except HfHubHTTPError as error:
            if error.response.status_code == 409:  # there before, or made by a call whose answer was lost
                return False
            raise

    is_new = _ask(f"making {repo_id}", repo_id, create)
    info = _ask(f"looking at {repo_id}", repo_id, lambda: api.model_info(repo_id))
    files = {} if is_new else tree(repo_id, info.sha)
    return State(repo_id, user.get("name", "?"), is_new, bool(info.private), info.sha, files)


def tree(repo_id: str, revision: str | None = None) -> dict[str, Any]:
    """path -> RepoFile of what lies there."""
    found = _ask(
        f"listing {repo_id}",
        repo_id,
        lambda: list(_api().list_repo_tree(repo_id, recursive=True, revision=revision)),
    )
    return {file.path: file for file in found if hasattr(file, "blob_id") and file.path not in GIT}


def commit(state: State, items: list[Item], deleted: list[str], message: str) -> str:
    """All of it in one commit; returns its id. A commit whose answer was lost is not made twice."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    tried: list[bool] = []

    def send() -> str:
        if tried and (head := _api().model_info(state.repo_id).sha) != state.sha:
            return str(head)  # ours, whose answer was lost; were it another's, `differing` would tell
        tried.append(True)
        operations: list[Any] = [
            CommitOperationAdd(i.path, i.content if i.content is not None else str(i.source)) for i in items
        ]
        operations += [CommitOperationDelete(path) for path in deleted]
        made = _api().create_commit(state.repo_id, operations, commit_message=message, parent_commit=state.sha)
        return str(made.oid)

    return _ask(f"sending to {state.repo_id}", state.repo_id, send)


def remove(repo_id: str, paths: list[str], message: str) -> None:
    from huggingface_hub import CommitOperationDelete

    operations = [CommitOperationDelete(path) for path in paths]
    _ask(f"cleaning {repo_id}", repo_id, lambda: _api().create_commit(repo_id, operations, commit_message=message))


def restore(state: State, there: dict[str, Any], message: str) -> None:
    """The files as they were before, in one commit; large ones are copied on the Hub."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    changed = [p for p, file in state.files.items() if p not in there or there[p].blob_id != file.blob_id]
    operations: list[Any] = [CommitOperationCopy(path, path, src_revision=state.sha) for path in changed]
    operations += [CommitOperationDelete(path) for path in sorted(set(there) - set(state.files))]
    _ask(
        f"cleaning {state.repo_id}",
        state.repo_id,
        lambda: _api().create_commit(state.repo_id, operations, commit_message=message),
    )


def differing(files: dict[str, Any], hashes: dict[str, tuple[int, str, str]]) -> list[str]:
    """Paths that are not there as (size, SHA-256, git blob id) say."""
    bad = []
    for path, (size, sha256, blob) in hashes.items():
        there = files.get(path)
        if there is None or there.size != size or (there.lfs.sha256 != sha256 if there.lfs else there.blob_id != blob):
            bad.append(path)
    return bad


def publish(repo_id: str) -> None:
    """Makes it public."""
    _ask(f"making {repo_id} public", repo_id, lambda: _api().update_repo_settings(repo_id, private=False))
