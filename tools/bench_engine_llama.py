"""llama.cpp on token sequences: ``python bench_engine_llama.py GGUF THREADS NICENESS``.

``tools/bench_engine.py`` runs this in the environment that holds llama.cpp's package, and nothing
of edgemoa is used here. A line of JSON in is a request, a line out its answer:

- ``{"prompts": [[...], ...], "count": N}``: read each prompt, from nothing, then write N tokens
  after each, the likeliest ones, all sequences in one batch, whatever they say of an end;
- the answer has ``first_s``, from the beginning to the first token of the last prompt; ``rest_s``,
  for the N - 1 tokens of each that follow; and ``tokens``, those of each.

llama.cpp's own defaults hold (half-precision cache, flash attention where it likes it), but for
the threads. No server stands between: this is the library at its fastest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

CONTEXT_TOKENS = 2048  # of a sequence by itself
SHARED_TOKENS = 512  # of each of several
BATCH_TOKENS = 2048


class Model:
    """A loaded file, with a context for each number of sequences that was asked for."""

    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self._threads = threads
        self._model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._contexts: dict[int, Any] = {}

    def answer(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """See above."""
        context = self._context(len(prompts))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, len(prompts))
        try:
            began = time.perf_counter()
            tokens = []
            for number, prompt in enumerate(prompts):
                self._run(context, batch, [(number, at, token) for at, token in enumerate(prompt)])
                tokens.append([self._likeliest(context, len(prompt) - 1)])
            first = time.perf_counter()
            for written in range(count - 1):
                self._run(
                    context,
                    batch,
                    [
                        (number, len(prompt) + written, tokens[number][-1])
                        for number, prompt in enumerate(prompts)
                    ],
                    all_logits=True,
                )
                for number, line in enumerate(tokens):
                    line.append(self._likeliest(context, number))
            ended = time.perf_counter()
        finally:
            llama_cpp.llama_batch_free(batch)
        return {"first_s": first - began, "rest_s": ended - first, "tokens": tokens}

    def _context(self, sequences: int) -> Any:
        if sequences not in self._contexts:
            params = llama_cpp.llama_context_default_params()
            params.n_ctx = CONTEXT_TOKENS if sequences == 1 else SHARED_TOKENS * sequences
            params.n_batch = BATCH_TOKENS
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[sequences] = llama_cpp.llama_init_from_model(self._model, params)
        return self._contexts[sequences]

    def _run(
        self,
        context: Any,
        batch: Any,
        entries: list[tuple[int, int, int]],
        all_logits: bool = False,
    ) -> None:
        """Run (sequence, position, token) entries; logits of the last one, or of all."""
        batch.n_tokens = len(entries)
        for index, (sequence, position, token) in enumerate(entries):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = all_logits or index == len(entries) - 1
        failed = llama_cpp.llama_decode(context, batch)
        if failed:
            raise SystemExit(f"llama.cpp's decoding failed: {failed}")

    def _likeliest(self, context: Any, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())


def main() -> None:
    """Answer until the input ends."""
    path, threads, niceness = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.nice(niceness)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    model = Model(path, threads)
    print(json.dumps({"version": llama_cpp.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(model.answer(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
