"""Test session: no network, no tokenizer threads, one CPU thread (tiny models run slower on more)."""

import os
import signal

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import gc
import socket

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a session in the background: what it starts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports() -> None:
    """Takes what is imported by now out of garbage collection: accelerate collects after every training, 0.5 s each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def closed_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine; gloo, DataLoader workers and local servers still work."""

    def guard(name: str):
        connect = getattr(socket.socket, name)

        def guarded(self: socket.socket, address):
            is_inet = self.family in (socket.AF_INET, socket.AF_INET6)
            is_local = is_inet and (
                address[0] in ("localhost", "::1", socket.gethostname()) or address[0].startswith("127.")
            )
            if is_inet and not is_local:
                raise RuntimeError(f"tests keep sockets closed, and this one connects to {address}")
            return connect(self, address)

        return guarded

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard(name))
