"""Tokens per second of one growing row on one thread: our lean decoder, transformers' generate, llama.cpp.

    python benchmarks/decode.py [--rounds 7] [--shapes 4x128 8x384] [--new 200] [--threads 1]

Each shape is a model of ours with redrawn weights in float32 and a byte-level BPE of 1,024 ids; the same prompt of
16 tokens is continued greedily by all, in alternation; counted is the time from prompt to last token.
llama.cpp runs the same weights as GGUF f32 where the package llama_cpp is there. The tokens of all must be equal.
Leaves out batches, sampling and loading.
"""

import argparse
import contextlib
import importlib.util
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Way = Callable[[list[int], int], list[int]]  # prompt, number of new tokens -> those
sys.path.insert(0, str(ROOT))


def build(layers: int, width: int, context: int, folder: Path) -> None:
    """A model folder. Matrices N(0, 0.05), norms 1 + N(0, 0.1): far from ties, so that equal tokens mean something."""
    import torch

    from llmkit.data.tokenizer import train_bpe
    from llmkit.model import LlmkitConfig, LlmkitForCausalLM

    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "llmkit").rglob("*.py"))]
    tokenizer = train_bpe(texts, 1024)
    config = LlmkitConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
        max_position_embeddings=context, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlmkitForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.05 if p.ndim > 1 else 1 + noise * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def ways(folder: Path, context: int, threads: int) -> Iterator[tuple[dict[str, Way], int]]:
    """What each is called, and the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmkit.deploy.decode import LeanDecoder
    from llmkit.deploy.sampling import Settings, write
    from llmkit.run import quiet_libraries

    quiet_libraries()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = None  # all write as many tokens
    decoder = LeanDecoder(AutoModelForCausalLM.from_pretrained(folder).eval(), context)

    def settings(count: int) -> Settings:
        return Settings(eos=(-1,), pad=0, max_new_tokens=count)

    def by_generate(ids: list[int], count: int) -> list[int]:
        inputs = torch.tensor([ids])
        mask = torch.ones_like(inputs)
        out = model.generate(inputs, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
        return out[0, len(ids) :].tolist()

    found = {
        "lean": lambda ids, count: write(decoder, None, ids, settings(count)).ids,  # type: ignore[arg-type]
        "generate": by_generate,
    }
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("llama_cpp") is None:
            print("llama_cpp is not installed: pip install llama-cpp-python adds its column")
        else:
            found["llama.cpp"] = by_llama_cpp(folder, context, threads, stack)
        yield found, sum(p.numel() for p in model.parameters())


def by_llama_cpp(folder: Path, context: int, threads: int, stack: contextlib.ExitStack) -> Way:
    """In a process of its own: closed in one in which `generate` has run, llama-cpp-python 0.3.36 crashes."""
    from llmkit.deploy.export import main as export
    from llmkit.verbs import ExportConfig

    with contextlib.redirect_stdout(io.StringIO()):
        export(ExportConfig(str(folder), to="gguf", output_dir=str(folder / "gguf"), outtype="f32"))
    file = next((folder / "gguf").glob("*.gguf"))
    spawn = multiprocessing.get_context("spawn")
    pool = stack.enter_context(spawn.Pool(1, _open_llama, (str(file), context, threads)))
    return lambda ids, count: pool.apply(_llama_greedy, (ids, count))


def _open_llama(file: str, context: int, threads: int) -> None:
    import llama_cpp

    global llama
    llama = llama_cpp.Llama(
        file, n_ctx=context, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
    )


def _llama_greedy(ids: list[int], count: int) -> list[int]:
    llama.reset()
    llama.eval(ids)
    new: list[int] = []
    while len(new) < count:
        new.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        if len(new) < count:
            llama.eval(new[-1:])
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x128", "8x384"], help="layers x width")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=200, help="tokens to write")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    prompt = list(range(300, 316))
    for shape in args.shapes:
        layers, width = (int(part) for part in shape.split("x"))
        with contextlib.ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory())
            build(layers, width, len(prompt) + args.new, Path(name) / "model")
            found, count = stack.enter_context(ways(Path(name) / "model", len(prompt) + args.new, args.threads))
            seconds: dict[str, list[float]] = {way: [] for way in found}
            written = {way: run(prompt, args.new) for way, run in found.items()}  # also warms up
            for _ in range(args.rounds):
                for way, run in found.items():
                    started = time.perf_counter()
                    run(prompt, args.new)
                    seconds[way].append(time.perf_counter() - started)
        rates = "   ".join(f"{way} {args.new / statistics.median(times):7,.0f}" for way, times in seconds.items())
        ratios = [theirs / ours for ours, theirs in zip(seconds["lean"], seconds["generate"], strict=True)]
        same = ", ".join(f"{way} {tokens == written['lean']}" for way, tokens in written.items() if way != "lean")
        print(
            f"{layers} layers, {width} wide, {count / 1e6:.1f} M parameters, threads {args.threads}: tokens/s {rates}\n"
            f"  lean / generate {statistics.median(ratios):.2f} (median of {args.rounds} rounds, "
            f"{min(ratios):.2f} to {max(ratios):.2f}); the same {args.new} tokens: {same}",
            flush=True,
        )


if __name__ == "__main__":
    main()
