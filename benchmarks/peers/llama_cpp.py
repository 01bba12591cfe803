"""llama.cpp through llama-cpp-python's low-level API, for `compare.py`.

Its high-level API has one stream. This is a small continuous batching over its batches: prompts enter as long as sequences are
free, a step decodes one token of each; prompts of one workload with a common start share it (`memory_seq_cp`), as its own
server would; n samples of a prompt share the prompt. With `q4_0` behind the folder its own quantisation runs (Q4_0).
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import llama_cpp as ll  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from record import Item

from peers.protocol import Run, serve

STREAMS = 64
BATCH = 2048
CONTEXT = 64 * 832


class Engine:
    """A model and one context with a unified KV cache."""

    def __init__(self, path: Path) -> None:
        ll.llama_backend_init()
        # It is called from C as long as the library is: it must not be collected.
        self._silence = ll.llama_log_callback(lambda level, text, data: None)
        ll.llama_log_set(self._silence, ctypes.c_void_p())
        options = ll.llama_model_default_params()
        # Quantised weights that it lays out for AMX make it crash (0.3.36, on a Xeon): it takes them as they are there.
        options.use_extra_bufts = "amx_int8" not in Path("/proc/cpuinfo").read_text()
        self._model = ll.llama_model_load_from_file(str(path).encode(), options)
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, BATCH, 512
        params.n_seq_max, params.kv_unified = STREAMS, True
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        self._context = ll.llama_init_from_model(self._model, params)
        self._memory = ll.llama_get_memory(self._context)
        self._num_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self._model))
        self._batch = ll.llama_batch_init(BATCH, 0, 1)
        self._random = np.random.default_rng(0)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, np.ndarray]:
        """Rows are (token, position, sequence, whether its logits are wanted); returns logits by sequence."""
        wanted: dict[int, np.ndarray] = {}
        for start in range(0, len(rows), BATCH):
            part, batch = rows[start : start + BATCH], self._batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, has_logits) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, has_logits
                batch.seq_id[i][0] = sequence
            if status := ll.llama_decode(self._context, batch):
                raise SystemExit(f"llama_decode answered {status}")
            for i, (_, _, sequence, has_logits) in enumerate(part):
                if has_logits:
                    pointer = ll.llama_get_logits_ith(self._context, i)
                    wanted[sequence] = np.ctypeslib.as_array(pointer, (self._num_vocab,)).copy()
        return wanted

    def choose(self, logits: np.ndarray, is_random: bool) -> int:
        """The most likely token, or one at temperature 0.8."""
        if not is_random:
            return int(logits.argmax())
        weights = np.exp((logits - logits.max()) / 0.8).cumsum()
        return int(np.searchsorted(weights, self._random.random() * weights[-1]))

    def run(self, items: list[Item], n: int) -> tuple[float, list[int]]:
        """All requests, to their end."""
        ll.llama_memory_clear(self._memory, True)
        start = time.perf_counter()
        shared = os.path.commonprefix([item.prompt_token_ids for item in items])[:-1] if len(items) > 1 else []
        if len(shared) < 64:
            shared = []
        free = list(range(STREAMS))
        if shared:
            holder = free.pop()
            self.decode([(token, i, holder, False) for i, token in enumerate(shared)])
        waiting = list(enumerate(items))[::-1]
        live: dict[int, tuple[int, int, int, int]] = {}  # sequence -> request, position, last token, tokens left
        counts = [0] * len(items)
        while waiting or live:
            rows = [(token, position, sequence, True) for sequence, (_, position, token, _) in live.items()]
            forks: dict[int, tuple[int, list[int]]] = {}
            while waiting and len(free) >= n and len(rows) + len(waiting[-1][1].prompt_token_ids) <= BATCH:
                request, item = waiting.pop()
                sequences = [free.pop() for _ in range(n)]
                if shared:
                    ll.llama_memory_seq_cp(self._memory, holder, sequences[0], 0, len(shared))
                last = len(item.prompt_token_ids) - 1
                rows += [(item.prompt_token_ids[i], i, sequences[0], i == last) for i in range(len(shared), last + 1)]
                forks[sequences[0]] = request, sequences
            for sequence, logits in self.decode(rows).items():
                if sequence in forks:
                    request, sequences = forks[sequence]
                    length, wanted = len(items[request].prompt_token_ids), items[request].num_output_tokens
                    for fork in sequences:
                        if fork != sequence:
                            ll.llama_memory_seq_cp(self._memory, sequence, fork, 0, length)
                        live[fork] = request, length - 1, 0, wanted
                    chosen = [(fork, self.choose(logits, n > 1)) for fork in sequences]
                else:
                    chosen = [(sequence, self.choose(logits, n > 1))]
                for fork, token in chosen:
                    request, position, _, left = live.pop(fork)
                    counts[request] += 1
                    if left > 1:
                        live[fork] = request, position + 1, token, left - 1
                    else:
                        ll.llama_memory_seq_rm(self._memory, fork, -1, -1)
                        free.append(fork)
        return time.perf_counter() - start, counts


def quantized(path: Path) -> Path:
    """The file in Q4_0, written beside it if it isn't there."""
    target = path.with_name("model-q4_0.gguf")
    if not target.exists():
        params = ll.llama_model_quantize_default_params()
        # Of Q4_0, Q4_1 and Q4_K_M the fastest here, with all matrices in it.
        params.ftype, params.pure = ll.LLAMA_FTYPE_MOSTLY_Q4_0, True
        if ll.llama_model_quantize(str(path).encode(), str(target).encode(), params):
            raise SystemExit(f"llama.cpp could not quantise {path}")
    return target


def load() -> Run:
    """The bfloat16 GGUF of the folder, or what it becomes quantised."""
    path = Path(sys.argv[1]) / "model-bf16.gguf"
    engine = Engine(quantized(path) if sys.argv[2:] == ["q4_0"] else path)
    engine.run([Item(list(range(1000, 1064)), 8)], 1)
    return engine.run


if __name__ == "__main__":
    serve("llama.cpp", ("llama-cpp-python",), load)
